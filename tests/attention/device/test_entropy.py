"""Budget entropy on a GPU: every layer's pages are those that the pipeline on CPU gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.attention.device.densities import DeviceDensities
from kvplug.budget.density import Densities
from tests.attention.device.schedule import schedule
from tests.attention.device.stock import stand_in
from tests.attention.device.test_impl import close
from tests.attention.device.world import SMALL, World
from tests.made_up import Piece

LAYERS = 3
PROMPTS = {0: 230, 1: 70, 2: 243}
SHARP = {"name": "entropy", "temperature": 0.2}


def world_of(monkeypatch: pytest.MonkeyPatch, policy: str = "simhash", **options: Any) -> World:
    stand_in(monkeypatch, SMALL)
    options = {"budget": SHARP, **options}
    return World(policy, layers=LAYERS, options=options, budget=64, sink=16, dense_below=64)


def agrees(world: World, pieces: list[Piece]) -> bool:
    """Whether every layer selects the pages that it does on CPU, and the first attends to them."""
    attended = close(world.step(pieces), world.expected(pieces))
    return attended and world.selected() == world.on_cpu_selected


def means(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """``[pages, L, 2]`` on both."""
    mine = world.builder.pipeline.common[DeviceDensities]
    theirs = world.on_cpu.common[Densities]
    assert isinstance(mine, DeviceDensities)
    assert isinstance(theirs, Densities)
    return mine.means.cpu(), theirs.means


def assert_same_densities(world: World) -> None:
    """Sums over a few hundred scores, in another order."""
    mine, theirs = means(world)
    assert torch.equal(mine[..., 1], theirs[..., 1])
    assert theirs[..., 1].any()
    torch.testing.assert_close(mine[..., 0], theirs[..., 0], rtol=1e-4, atol=1e-5)


def pages_of(world: World, token: int) -> list[int]:
    """How many pages each layer's first head attends to."""
    return [len(layer[token][0]) for layer in world.selected()]


@pytest.mark.parametrize(
    ("policy", "options", "limit"),
    [
        ("simhash", {}, 64),
        ("quest", {}, 128),
        ("actqkv", {}, 128),
        ("actqkv", {"index": "simhash", "probe": ["activation", "last_activated"]}, 128),
    ],
    ids=["simhash", "quest", "actqkv", "actqkv-hash"],
)
def test_requests_of_unequal_lengths(
    policy: str, options: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded tokens beside prompts; layers get different numbers."""
    world = world_of(monkeypatch, policy, **options)
    told: set[int] = set()
    for pieces in schedule(PROMPTS, limit, 2):
        assert agrees(world, pieces), pieces
        sparse = [n for n, piece in enumerate(pieces) if not piece.prefilling]
        told |= {
            len(set(pages_of(world, token))) for token in sparse if token in world.selected()[0]
        }
    assert_same_densities(world)
    assert max(told) > 1, "no token's layers differ"


def test_counts_are_those_of_the_pipeline_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told without anybody waiting; here, where nothing is remote, at once."""
    world = world_of(monkeypatch)
    for pieces in schedule(PROMPTS, 128, 3):
        assert agrees(world, pieces)
        assert world.builder.pipeline.counts == world.on_cpu.counts
    assert world.on_cpu.counts.pages_attended > 0


def test_counts_of_some_of_a_models_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose caches are in one of several groups."""
    world = world_of(monkeypatch)
    densities = world.builder.pipeline.common[DeviceDensities]
    assert isinstance(densities, DeviceDensities)
    assert densities.ranks == set(range(LAYERS))
    pieces = [Piece(0, 230, 1, False), Piece(1, 200, 1, False)]
    world.fill(pieces)
    densities.ranks.discard(1)
    before = densities.attended.told
    world.step(pieces)
    heads, budget = SMALL.kv_heads, 64 // SMALL.page  # for want of densities, all get the budget
    assert densities.attended.told - before == 2 * 2 * heads * budget


def test_a_prefix_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the prompt that filled the pages learnt, another goes on from."""
    world = world_of(monkeypatch)
    world.content_of[4] = 0
    for step in schedule({0: 230}, 64, 2):
        assert agrees(world, step)
    world.pages[4] = world.pages[0][:12]  # six windows, the last of them sparse
    pieces = (Piece(4, 192, 50, True), Piece(4, 242, 1, False), Piece(4, 243, 1, False))
    for number, piece in enumerate(pieces):
        assert agrees(world, [Piece(0, 232 + number, 1, False), piece])
    assert_same_densities(world)
    mine, _ = means(world)
    assert (mine[world.pages[4][224 // 16], :, 1] > mine[world.pages[4][11], :, 1]).all()


def test_a_prefix_of_a_request_of_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM hands out blocks that the step itself fills."""
    world = world_of(monkeypatch)
    world.content_of[4] = 0
    assert agrees(world, [Piece(0, 0, 128, True)])
    world.slots(0, 128, 192)
    world.pages[4] = world.pages[0][:12]
    assert agrees(world, [Piece(0, 128, 64, True), Piece(4, 192, 50, True)])
    assert agrees(world, [Piece(0, 192, 1, True), Piece(4, 242, 1, False)])
    assert_same_densities(world)


# The interpreter warns of what comes of NaN.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_head_with_a_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores are no numbers, and its density does not count; the other head's does."""
    world = world_of(monkeypatch, "quest")
    world.content(0).queries[210, 1, 5] = torch.nan
    for pieces in schedule({0: 230}, 64, 3):
        found, expected = world.step(pieces), world.expected(pieces)
        known = [n for n in range(len(found)) if pieces[0].start + n != 210]
        assert close(found[known], expected[known])
        assert world.selected() == world.on_cpu_selected
    assert_same_densities(world)


def test_pages_of_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(monkeypatch)
    for pieces in schedule({5: 230}, 64, 1):
        world.step(pieces)
        world.expected(pieces)
    before = world.pages.pop(5)
    world._free.extend(before)
    for pieces in schedule({6: 243}, 96, 2):
        assert agrees(world, pieces)
    assert set(before) <= set(world.pages[6])
    fresh = world_of(monkeypatch)
    for pieces in schedule({6: 243}, 96, 2):
        fresh.step(pieces)
    last = 224 // 16
    assert torch.equal(means(world)[0][world.pages[6][last]], means(fresh)[0][fresh.pages[6][last]])


def test_replayed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin two windows in one step, of which later layers have handed nothing on."""
    world = world_of(monkeypatch)
    for pieces in schedule({0: 185}, 96, 0):
        assert agrees(world, pieces)
    assert agrees(world, [Piece(0, 185, 42, False)])
    for token in (0, 20, 41):  # of the prompt's last window, of the next and of the one behind it
        assert len(set(pages_of(world, token))) > 1, "layers do not differ"
    assert_same_densities(world)


def test_windows_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the scratch holds; what they learn is the same."""
    monkeypatch.setattr("kvplug.attention.device.pipeline.SCRATCH", 1)
    world = world_of(monkeypatch)
    for pieces in schedule({0: 230, 1: 200}, 128, 1):
        assert agrees(world, pieces)
    assert_same_densities(world)
    assert world.builder.pipeline.counts == world.on_cpu.counts
