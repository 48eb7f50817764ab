"""What a layer remembers on a GPU: what the index on CPU does, whatever the chunks were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.attention.device.memory import BoundMemory, ChannelMemory, SignMemory
from kvplug.index.minmax import MinMaxIndex
from kvplug.kernels.page_statistics import page_statistics_reference
from tests.attention.device.stock import stand_in
from tests.attention.device.world import World
from tests.made_up import Piece

LENGTH = 150


def state_of(world: World) -> tuple[torch.Tensor, ...]:
    assert world.impl.stages is not None
    assert world.impl.stages.memory is not None
    return world.impl.stages.memory.state


def codes_of(world: World, request: int, pages: int) -> torch.Tensor:
    """``[n, ...]`` codes of a request's first pages."""
    return state_of(world)[0][world.pages[request][:pages]]


def remembered(world: World, request: int) -> list[torch.Tensor]:
    """Codes of a request's whole pages, and what is kept on its first."""
    codes = codes_of(world, request, LENGTH // world.shape.page)
    return [codes, *(tensor[world.pages[request][0]] for tensor in state_of(world)[1:])]


def write(world: World, *pieces: Piece) -> None:
    """A step's keys enter the cache and the layer's memory."""
    metadata, keys, _ = world.enter(list(pieces))
    assert world.impl.stages is not None
    assert metadata.plan is not None
    world.impl.stages.write(keys, metadata.plan)


@pytest.mark.parametrize("policy", ["channels", "simhash", "quest"])
def test_chunks_do_not_matter(policy: str) -> None:
    """At once; in windows; in chunks that end in the middle of one, the last tokens decoded."""
    world = World(policy)
    world.fill([Piece(5, LENGTH, 1, False)])
    expected = remembered(world, 5)
    assert expected[0].any()
    for chunk in (32, 20):
        other = World(policy)
        other.fill([Piece(5, LENGTH - 9, 1, False)], chunk)
        for start in range(LENGTH - 9, LENGTH):  # at 144 tokens they fill a page
            write(other, Piece(5, start, 1, False))
        assert all(map(torch.equal, remembered(other, 5), expected))


def test_a_prompt_shorter_than_what_channels_are_chosen_by() -> None:
    """Its tokens are encoded once the last of the first tokens is decoded."""
    world = World("channels")
    world.fill([Piece(2, 20, 1, False)])
    assert not remembered(world, 2)[0].any()
    for start in range(20, 33):
        write(world, Piece(2, start, 1, False))
    whole = World("channels")
    whole.fill([Piece(2, 33, 1, False)])
    assert torch.equal(codes_of(world, 2, 2), codes_of(whole, 2, 2))


def test_a_prefix_of_a_request_of_the_same_step() -> None:
    """vLLM hands out blocks that the step itself fills; their channels are chosen before."""
    world = World("channels")
    world.slots(1, 0, 64)
    world.pages[4] = world.pages[1][:2]
    world.content_of[4] = 1
    write(world, Piece(1, 0, 64, True), Piece(4, 32, 40, True))
    alone = World("channels")
    alone.fill([Piece(1, 72, 1, False)])
    assert torch.equal(codes_of(world, 4, 4), codes_of(alone, 1, 4))


@pytest.mark.parametrize("policy", ["channels", "simhash", "quest"])
def test_pages_of_another_request(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they said of its keys is forgotten by the time that anybody asks."""
    world = World(policy)
    stand_in(monkeypatch, world.shape)
    world.fill([Piece(5, LENGTH, 1, False)])
    world.step([Piece(5, LENGTH, 1, False)])
    before = world.pages.pop(5)
    world._free.extend(before)
    piece = Piece(6, LENGTH + 9, 1, False)
    world.fill([piece], 20)
    assert set(before) <= set(world.pages[6])
    found, fresh = world.step([piece]), World(policy)
    fresh.fill([piece])
    assert all(map(torch.equal, remembered(world, 6), remembered(fresh, 6)))
    assert (found.double().cpu() - world.expected([piece])).abs().max() < 2.0**-7


def test_bounds_are_those_of_whole_pages_only() -> None:
    """A page is bounded by its last token: at once, or by and by, and in steps of several."""
    world = World("quest")
    page = world.shape.page
    world.slots(1, 0, 3 * page)
    world.slots(2, 0, 3 * page)
    bounds = state_of(world)[0]
    steps = [
        [Piece(1, 0, 40, True), Piece(2, 0, 15, True)],
        [Piece(1, 40, 7, False), Piece(2, 15, 1, False)],  # request 2 fills its first page
        [Piece(1, 47, 1, False), Piece(2, 16, 32, True)],
    ]
    filled = [(2, 0), (2, 1), (3, 3)]
    for pieces, pages in zip(steps, filled, strict=True):
        write(world, *pieces)
        whole = [n for request, num in zip((1, 2), pages, strict=True)
                 for n in world.pages[request][:num]]  # fmt: skip
        assert bounds.flatten(1).any(1).nonzero()[:, 0].tolist() == sorted(whole)
        expected = torch.zeros_like(bounds)
        assert world.impl.cache is not None
        page_statistics_reference(world.impl.cache.keys, torch.tensor(whole), bounds=expected)
        assert torch.equal(bounds, expected)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [("channels", ChannelMemory), ("simhash", SignMemory), ("quest", BoundMemory)],
)
def test_the_index_on_cpu_stores_the_same(policy: str, kind: type) -> None:
    """Of every page that a window may retrieve."""
    world = World(policy)
    pieces = [Piece(7, LENGTH, 1, False)]
    world.fill(pieces)
    world.enter(pieces)
    world.expected(pieces)
    assert world.impl.stages is not None
    assert isinstance(world.impl.stages.memory, kind)
    assert world.cpu_layer is not None
    far_end = (LENGTH + 1 - 32) // 16
    pages = torch.tensor(world.pages[7][1:far_end])
    mine = [tensor.cpu() for tensor in state_of(world)]
    if isinstance(world.cpu_layer.index, MinMaxIndex):
        mine = [tensor.view(torch.int16) for tensor in mine]
    theirs = world.cpu_layer.index.state
    assert torch.equal(mine[0][pages], theirs[0][pages])
    assert mine[0][pages].any()
    first = world.pages[7][0]
    for ours, other in zip(mine[1:], theirs[1:], strict=True):
        # Sums of a context's first keys come in another order.
        assert np.allclose(ours[first], other[first], rtol=1e-4, atol=1e-6)
