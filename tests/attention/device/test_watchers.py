"""What watches on a GPU is told of every step, before anything is scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.attention.device.probes import make_probe
from kvplug.attention.device.watchers import BoundLayer, DeviceState, DeviceWatcher
from tests.attention.device.stock import stand_in
from tests.attention.device.world import World
from tests.made_up import Piece

PIECES = [Piece(0, 0, 64, True), Piece(0, 64, 96, True), Piece(0, 160, 1, False)]


class Told(DeviceWatcher):
    """Notes what it is told."""

    def __init__(self, layer: BoundLayer) -> None:
        super().__init__(layer)
        self.steps: list[tuple[Any, ...]] = []
        self.seen = torch.zeros(layer.shape.num_pages, 3, device=layer.device)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        return (self.seen,)

    def watch(self, queries: torch.Tensor, keys: torch.Tensor, cache: Any, plan: Any) -> None:
        slots, page = plan.slots, cache.keys.shape[1]
        cached = cache.keys[slots // page, slots % page]
        assert torch.equal(cached, keys)
        assert len(queries) == len(keys) == int(plan.stream.num_tokens.sum())
        self.steps.append((plan.stream.context_end.tolist(), queries))


class Common(DeviceState):
    """Of all layers."""

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(7),)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    """Watchers that layers get with their probe; two of their stages ask for the same."""
    found: list[Told] = []

    def with_watcher(probe: Any, layer: BoundLayer) -> Any:
        found.append(layer.own(Told))
        assert layer.own(Told) is found[-1]
        layer.shared(Common)
        return make_probe(probe, layer)

    monkeypatch.setattr("kvplug.attention.device.pipeline.make_probe", with_watcher)
    return found


def test_watchers_see_every_step_before_it_is_scored(
    told: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense ones too; in the order of their tokens."""
    world = World("quest")
    stock = stand_in(monkeypatch, world.shape)
    (watcher,) = told
    assert world.builder.pipeline.watched
    layer = world.impl.stages
    assert layer is not None
    assert layer.watchers == [watcher]
    select = layer.select
    scored: list[int] = []

    def counted(*args: Any) -> Any:
        scored.append(len(watcher.steps))
        return select(*args)

    monkeypatch.setattr(layer, "select", counted)
    for piece in PIECES:
        world.step([piece])
    assert stock.tokens[0] == 64
    assert [ends for ends, _ in watcher.steps] == [[32, 64], [96, 128, 160], [161]]
    assert torch.equal(watcher.steps[1][1], world.new([PIECES[1]], 2))
    assert scored == [2, 3]


def test_recipes_without_them_have_no_stream() -> None:
    world = World("quest")
    metadata, _, _ = world.enter([PIECES[0]])
    assert not world.builder.pipeline.watched
    assert metadata.plan is not None
    assert metadata.plan.stream is None


def test_bytes_of_watchers_and_of_what_layers_share_count(told: list[Told]) -> None:
    world = World("quest")
    own = world.builder.pipeline.nbytes()
    told[0].seen = told[0].seen[:, :0]
    assert own - world.builder.pipeline.nbytes() == world.shape.num_pages * 3 * 4
    world.impl.bind(world.cache, world.geometry)
    assert world.builder.pipeline.nbytes() > own
    assert len(world.builder.pipeline.common) == 1
