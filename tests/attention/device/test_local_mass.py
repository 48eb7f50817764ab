"""Mass and representatives on a GPU: those on CPU, whatever the chunks, and the same selections."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.attention.device.local_mass import DeviceLocalMass, SampledWindows
from kvplug.attention.device.representative_memory import RepresentativeMemory
from kvplug.index.local_mass import LocalMass
from kvplug.index.representative import RepresentativeIndex
from kvplug.kernels.settled_pages import SETTLED
from tests.attention.device.stock import stand_in
from tests.attention.device.world import Content, Shape, World
from tests.made_up import Piece

PAGE = 16
MIXED = [
    Piece(0, 230, 1, False),
    Piece(1, 128, 37, True),
    Piece(2, 40, 1, False),  # dense
    Piece(3, 32, 70, True),  # dense, then sparse
    Piece(4, 191, 1, False),  # with a query that counts
]


def mass_of(world: World) -> DeviceLocalMass:
    assert world.impl.stages is not None
    return world.impl.stages.bound.own(DeviceLocalMass)


def mass_on_cpu(world: World) -> LocalMass:
    assert world.cpu_layer is not None
    return next(m for m in world.cpu_layer.memories if isinstance(m, LocalMass))


def of_request(world: World, request: int) -> torch.Tensor:
    """``[pages, Hk, P]`` mass of a request's pages."""
    return mass_of(world).mass[world.pages[request]].cpu()


def agrees(world: World, pieces: list[Piece]) -> bool:
    """Whether the step attends to what the pipeline on CPU selects, and both have the same mass."""
    found = world.step(pieces)
    expected = world.expected(pieces)
    mine, theirs = mass_of(world), mass_on_cpu(world)
    # Sums of up to 30 shares of 1, of logits of up to 10 whose products are rounded.
    torch.testing.assert_close(mine.mass.cpu(), theirs.mass, rtol=1e-5, atol=2e-5)
    # Float16 outputs of about 1, sums of float16 products.
    return bool((found.double().cpu() - expected).abs().max() < 2.0**-7)


def walk(world: World, request: int, chunks: list[int], decoded: int = 0) -> None:
    """A request's prompt in chunks of so many tokens, then tokens one by one; both pipelines."""
    start = 0
    for tokens in chunks + [1] * decoded:
        piece = Piece(request, start, tokens, start < sum(chunks))
        world.step([piece])
        world.expected([piece])
        start += tokens


@pytest.mark.parametrize(
    "options",
    [
        {}, {"heads": "each"}, {"top": 1, "probe": {"name": "last_activated", "last": 2}},
        {"index": {"name": "representative", "metric": "cosine", "reduce": "max"}},
        {"index": {"name": "representative", "metric": "cosine", "heads": "all"}},
    ],
    ids=str,
)  # fmt: skip
def test_a_mixed_step(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of unequal lengths: decoded tokens, sparse and dense windows."""
    world = World("infllm", options=options)
    stand_in(monkeypatch, world.shape)
    world.fill(MIXED)
    assert agrees(world, MIXED)
    assert isinstance(world.impl.stages.memory, RepresentativeMemory)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (Shape(3, 1, 80, 32), "LBNHC"), (Shape(1, 3, 64, 64), "BLNHC"),
        (Shape(1, 8, 128, 16), "LBHNC"),
    ],
    ids=["g1-d80-p32", "g3-p64", "g8-d128"],
)  # fmt: skip
def test_shapes_and_layouts(shape: Shape, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, shape)
    sizes = {"budget": shape.page, "window": 64, "sink": 0, "dense_below": 32}
    world = World("infllm", shape, layout, **sizes)
    pieces = [Piece(0, 230, 1, False), Piece(1, 192, 50, True)]
    world.fill(pieces)
    assert agrees(world, pieces)


def test_a_request_from_its_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks, then decoded, beside another one a step behind; in turns of a window."""
    monkeypatch.setattr("kvplug.attention.device.pipeline.SCRATCH", 1)
    monkeypatch.setattr("kvplug.attention.device.local_mass.SCRATCH", 1)
    world = World("infllm")
    stand_in(monkeypatch, world.shape)
    chunks = [(0, 64), (64, 96), (160, 30), (190, 1), (191, 1), (192, 1)]  # 191 is a query's
    for number in range(len(chunks) + 1):
        pieces = [
            Piece(request, *chunks[n], chunks[n][0] < 190)
            for request, n in enumerate((number, number - 1))
            if 0 <= n < len(chunks)
        ]
        assert agrees(world, pieces)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, mass and representatives: in one chunk or several, alone or beside others."""
    one, several, batched = (World("infllm") for _ in range(3))
    stand_in(monkeypatch, one.shape)
    walk(one, 5, [192], decoded=3)
    walk(several, 5, [32, 96, 64], decoded=3)
    for start in range(0, 192, 64):
        batched.step([Piece(4, start, 32, True), Piece(5, start, 64, True)])
    for start in range(192, 195):
        batched.step([Piece(5, start, 1, False), Piece(4, start - 32, 1, False)])
    expected, settled = of_request(one, 5), (194 + 1 - 32) // PAGE
    assert (expected > 0).any(-1).sum() > 10
    for other in (several, batched):
        assert torch.equal(of_request(other, 5), expected)
        vectors = [
            world.impl.stages.memory.state[0][world.pages[5][1:settled]]  # type: ignore[union-attr]
            for world in (one, other)
        ]
        assert torch.equal(*vectors)
        assert vectors[0].any(-1).all()


def test_the_index_on_cpu_stores_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Representatives of the pages that a window may retrieve; others are open."""
    world = World("infllm")
    stand_in(monkeypatch, world.shape)
    walk(world, 7, [160], decoded=41)
    far_end = (200 + 1 - 32) // PAGE
    far = torch.tensor(world.pages[7][1:far_end])
    assert world.cpu_layer is not None
    index = world.cpu_layer.index
    assert isinstance(index, RepresentativeIndex)
    mine = world.impl.stages.memory.state[0].cpu()  # type: ignore[union-attr]
    assert torch.equal(mine[far], index.vectors[far])
    settled = (mass_of(world).seen == SETTLED.value).all(1).nonzero().flatten().tolist()
    assert settled == sorted(far.tolist())
    open_ = torch.tensor([n for n in world.pages[7] if n not in settled])
    assert torch.equal(mass_of(world).seen.cpu()[open_], mass_on_cpu(world).seen[open_])


def test_a_prefix_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second request begins on pages of the first, whose text goes on a little as its own.

    It computes windows again that the first went through: what they give is there already.
    """
    world = World("infllm")
    stand_in(monkeypatch, world.shape)
    mine, shared, agreed = world.content(1), 96, 192
    both = zip(mine, world.content(4), strict=True)
    world._content[4] = Content(*(torch.cat([a[:agreed], b[agreed:]]) for a, b in both))
    walk(world, 1, [192], decoded=20)
    before = of_request(world, 1)[: shared // PAGE]
    world.pages[4] = world.pages[1][: shared // PAGE]
    assert agrees(world, [Piece(4, shared, 128, True), Piece(1, 212, 1, False)])
    assert torch.equal(of_request(world, 4)[: shared // PAGE], before)
    assert agrees(world, [Piece(4, 224, 1, False), Piece(1, 213, 1, False)])
    alone = World("infllm")
    alone._content[4] = world._content[4]
    walk(alone, 4, [224], decoded=1)
    assert torch.equal(of_request(alone, 4), of_request(world, 4))


def test_two_requests_that_walk_the_same_window_in_one_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its pages get it once."""
    world, alone = World("infllm"), World("infllm")
    stand_in(monkeypatch, world.shape)
    world.content_of[4] = alone.content_of[4] = 1
    for each in (world, alone):
        walk(each, 1, [96])
    world.slots(1, 0, 160)
    world.pages[4] = world.pages[1][:6]
    pieces = [Piece(4, 96, 64, True), Piece(1, 96, 64, True)]
    assert agrees(world, pieces)
    alone.step(pieces[1:])
    assert torch.equal(of_request(world, 1), of_request(alone, 1))


def test_windows_count_in_the_order_of_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the batch: one request goes on from pages that another, listed behind it, fills."""
    world, alone = World("infllm"), World("infllm")
    stand_in(monkeypatch, world.shape)
    world.content_of[4] = 1
    walk(world, 1, [96])
    world.slots(1, 96, 128)
    world.pages[4] = world.pages[1][:8]
    assert agrees(world, [Piece(4, 128, 32, True), Piece(1, 96, 32, True)])
    walk(alone, 1, [160])
    assert torch.equal(of_request(alone, 1), of_request(world, 4))


def test_pages_of_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are open again, and have no mass but that of their new keys."""
    world, fresh = World("infllm"), World("infllm")
    stand_in(monkeypatch, world.shape)
    walk(world, 5, [128], decoded=30)
    before = world.pages.pop(5)
    world._free.extend(before)
    for each in (world, fresh):
        walk(each, 6, [128, 31], decoded=2)
    assert set(before) <= set(world.pages[6])
    assert torch.equal(of_request(world, 6), of_request(fresh, 6))
    assert agrees(world, [Piece(6, 161, 1, False)])


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_key_that_is_no_number(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets no mass and stands for no page."""
    world = World("infllm")
    stand_in(monkeypatch, world.shape)
    world.content(1).keys[70, 1, 5] = value
    pieces = [Piece(1, 230, 1, False), Piece(2, 191, 1, False)]
    world.fill(pieces, 64)
    assert (of_request(world, 1)[70 // PAGE, 1, 70 % PAGE]) == 0
    found, expected = world.step(pieces).double().cpu(), world.expected(pieces)
    # Where the page is attended to, nothing is a number.
    assert torch.equal(found.isnan(), expected.isnan())
    assert (found - expected).nan_to_num(0.0).abs().max() < 2.0**-7
    mine = world.impl.stages.memory.state[0].cpu()  # type: ignore[union-attr]
    assert mine[world.pages[1][70 // PAGE]].isfinite().all()


def test_steps_without_a_query_that_counts_find_no_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World("infllm")
    stand_in(monkeypatch, world.shape)
    world.fill([Piece(0, 100, 1, False), Piece(1, 95, 1, False)])
    assert world.impl.stages is not None
    sampled = world.impl.stages.bound.shared(SampledWindows)
    found = []
    for start in (94, 95, 96):
        world.step([Piece(0, start + 5, 1, False), Piece(1, start, 1, False)])
        found.append(sampled.order.tolist())
    assert found == [[], [1], []]
