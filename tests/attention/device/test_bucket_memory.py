"""Hash buckets, and unions with mass, on a GPU: the words and selections of those on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.attention.device.bucket_memory import BucketMemory
from kvplug.attention.device.selects import DeviceUnion
from kvplug.index.buckets import BucketIndex
from tests.attention.device.stock import stand_in
from tests.attention.device.test_local_mass import MIXED, PAGE, agrees, walk
from tests.attention.device.world import Content, Shape, World
from tests.made_up import Piece

FEWER = {"last": 2, "active": 1}


def memory_of(world: World) -> BucketMemory:
    assert world.impl.stages is not None
    memory = world.impl.stages.memory
    assert isinstance(memory, BucketMemory)
    return memory


def words_of(world: World, request: int, pages: int) -> torch.Tensor:
    """``[n, Hk, P]`` words of a request's first pages."""
    return memory_of(world).words[world.pages[request][:pages]]


@pytest.mark.parametrize(
    "options",
    [
        FEWER, {**FEWER, "split": 0.0}, {**FEWER, "split": 1.0, "bits": 4, "rounds": 5},
        {"probe": "mean"}, {**FEWER, "select": "top"},
    ],
    ids=str,
)  # fmt: skip
def test_a_mixed_step(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of unequal lengths: decoded tokens, sparse and dense windows."""
    world = World("hax", options=options, budget=64, dense_below=96)
    stand_in(monkeypatch, world.shape)
    world.fill(MIXED)
    pieces = [piece for piece in MIXED if piece.request != 3]
    if options.get("select") != "top":
        assert agrees(world, pieces)
    else:
        found = world.step(pieces).double().cpu()
        assert (found - world.expected(pieces)).abs().max() < 2.0**-7


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("infllm", {"select": {"name": "union", "split": 0.3}}),
        ("quest", {"select": "union"}),
    ],
    ids=str,
)  # fmt: skip
def test_unions_with_other_indexes(
    policy: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One memory of mass serves both, and settles pages once for them."""
    world = World(policy, options=options, budget=64, dense_below=96)
    stand_in(monkeypatch, world.shape)
    pieces = [Piece(0, 230, 1, False), Piece(1, 160, 37, True)]
    world.fill(pieces)
    assert agrees(world, pieces)
    assert world.impl.stages is not None
    assert isinstance(world.impl.stages.ranker, DeviceUnion)


def test_another_shape_and_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(2, 3, 80, 32)
    stand_in(monkeypatch, shape)
    world = World("hax", shape, "LBNHC", options=FEWER, budget=64, sink=0)
    pieces = [Piece(0, 230, 1, False), Piece(1, 192, 50, True)]
    world.fill(pieces)
    assert agrees(world, pieces)


def test_a_request_from_its_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose prompt is shorter than a window, beside one a step behind; in turns of a window."""
    monkeypatch.setattr("kvplug.attention.device.pipeline.SCRATCH", 1)
    world = World("hax", options=FEWER)
    stand_in(monkeypatch, world.shape)
    chunks = [(0, 64), (64, 96), (160, 31), (191, 1), (192, 1)]
    for number in range(len(chunks) + 1):
        pieces = [
            Piece(request, *chunks[n], chunks[n][0] < 191)
            for request, n in enumerate((number, number - 1))
            if 0 <= n < len(chunks)
        ]
        assert agrees(world, pieces)
    walk(world, 3, [20], decoded=3)
    assert memory_of(world).centre.keys[world.pages[3][0]].any()


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: at once, in windows, or decoded; alone or beside others."""
    one, other = World("hax", options=FEWER), World("hax", options=FEWER)
    stand_in(monkeypatch, one.shape)
    walk(one, 5, [128], decoded=20)
    for start in range(0, 128, 32):
        other.step([Piece(4, start, 32, True), Piece(5, start, 32, True)])
    for start in range(128, 148):
        other.step([Piece(5, start, 1, False)])
    assert torch.equal(words_of(other, 5, 9), words_of(one, 5, 9))
    assert words_of(one, 5, 9).any()


def test_the_index_on_cpu_stores_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("hax", options=FEWER)
    stand_in(monkeypatch, world.shape)
    walk(world, 7, [160], decoded=41)
    far = torch.tensor(world.pages[7][1 : (200 + 1 - 32) // PAGE])
    assert world.cpu_layer is not None
    index = world.cpu_layer.index
    assert isinstance(index, BucketIndex)
    assert torch.equal(memory_of(world).words.cpu()[far], index.words[far])
    first = world.pages[7][0]
    centre = memory_of(world).centre
    # Means of 32 keys and queries, whose sums come in another order.
    for mine, theirs in ((centre.keys, index.centre.keys), (centre.queries, index.centre.queries)):
        torch.testing.assert_close(mine[first].cpu(), theirs[first], rtol=1e-5, atol=1e-6)


def test_a_prefix_hit_and_pages_of_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second request is centred by the means that the first left on the page that both have."""
    world = World("hax", options=FEWER)
    stand_in(monkeypatch, world.shape)
    mine, shared, agreed = world.content(1), 96, 192
    both = zip(mine, world.content(4), strict=True)
    world._content[4] = Content(*(torch.cat([a[:agreed], b[agreed:]]) for a, b in both))
    walk(world, 1, [192], decoded=5)
    world.pages[4] = world.pages[1][: shared // PAGE]
    assert agrees(world, [Piece(4, shared, 128, True), Piece(1, 197, 1, False)])
    assert agrees(world, [Piece(4, 224, 1, False), Piece(1, 198, 1, False)])
    world._free.extend(sorted({*world.pages.pop(1), *world.pages.pop(4)}))
    walk(world, 6, [128, 40])
    assert agrees(world, [Piece(6, 168, 1, False)])


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
def test_a_key_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """It meets what it meets on CPU, and gets no mass."""
    world = World("hax", options=FEWER)
    stand_in(monkeypatch, world.shape)
    world.content(1).keys[70, 1, 5] = torch.nan
    pieces = [Piece(1, 230, 1, False), Piece(2, 191, 1, False)]
    world.fill(pieces, 64)
    found, expected = world.step(pieces).double().cpu(), world.expected(pieces)
    assert torch.equal(found.isnan(), expected.isnan())
    assert (found - expected).nan_to_num(0.0).abs().max() < 2.0**-7
