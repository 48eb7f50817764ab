"""Means of pages and chunks on a GPU: those of the index on CPU, and the same pages selected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvplug.attention.device.chunk_memory import ChunkMemory
from kvplug.attention.device.filled import chunk_ends
from kvplug.attention.device.plan import Lengths
from kvplug.index.chunk_mean import ChunkMeanIndex
from tests.attention.device.stock import stand_in
from tests.attention.device.world import Content, World
from tests.made_up import Piece

PAGE = 16
OPTIONS = {"pages": 2, "spread": 1.0}
MIXED = [
    Piece(0, 230, 1, False),
    Piece(1, 128, 37, True),
    Piece(2, 40, 1, False),  # dense
    Piece(3, 32, 70, True),  # dense, then sparse
    Piece(4, 201, 1, False),
]


def memory_of(world: World) -> ChunkMemory:
    assert world.impl.stages is not None
    memory = world.impl.stages.memory
    assert isinstance(memory, ChunkMemory)
    return memory


def remembered(world: World, request: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of a request's whole pages, and of its whole chunks."""
    memory, pages = memory_of(world), torch.tensor(world.pages[request])
    ends = pages[memory.chunk_pages - 1 : length // PAGE : memory.chunk_pages]
    return memory.means[pages[: length // PAGE]], memory.chunks[ends]


def write(world: World, *pieces: Piece) -> None:
    """A step's keys enter the cache and the layer's memory."""
    metadata, keys, _ = world.enter(list(pieces))
    assert world.impl.stages is not None
    assert metadata.plan is not None
    world.impl.stages.write(keys, metadata.plan)


def agrees(world: World, pieces: list[Piece]) -> bool:
    """Whether the step attends to what the pipeline on CPU selects."""
    found = world.step(pieces)
    # Float16 outputs of about 1, sums of float16 products.
    return bool((found.double().cpu() - world.expected(pieces)).abs().max() < 2.0**-7)


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS, {"pages": 3, "spread": 2.0}, {"pages": 1, "spread": 1.0},
        {**OPTIONS, "heads": "all"}, {"index": {"name": "chunk_mean", "reduce": "sum", **OPTIONS}},
        {**OPTIONS, "probe": {"name": "last_activated", "last": 2, "active": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_mixed_step(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of unequal lengths: decoded tokens, sparse and dense windows."""
    world = World("hcam", options=options)
    stand_in(monkeypatch, world.shape)
    world.fill(MIXED)
    assert agrees(world, MIXED)


def test_a_request_from_its_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks, then decoded, beside another one a step behind; turns change nothing."""
    monkeypatch.setattr("kvplug.attention.device.pipeline.SCRATCH", 1)
    world = World("hcam", options=OPTIONS)
    stand_in(monkeypatch, world.shape)
    chunks = [(0, 64), (64, 96), (160, 31), (191, 1), (192, 1)]  # a chunk is complete at 192
    for number in range(len(chunks) + 1):
        pieces = [
            Piece(request, *chunks[n], chunks[n][0] < 191)
            for request, n in enumerate((number, number - 1))
            if 0 <= n < len(chunks)
        ]
        assert agrees(world, pieces)


@pytest.mark.parametrize("per_chunk", [1, 2, 3])
def test_chunks_of_prompts_do_not_matter(per_chunk: int) -> None:
    """To the bit: at once; in windows; in chunks that end anywhere, the last tokens decoded."""
    options, length = {"pages": per_chunk}, 150
    world = World("hcam", options=options)
    world.fill([Piece(5, length, 1, False)])
    expected = remembered(world, 5, length)
    assert expected[0].any(-1).all()
    assert expected[1].any(-1).all()
    for chunk in (32, 20):
        other = World("hcam", options=options)
        other.fill([Piece(5, length - 9, 1, False)], chunk)
        for start in range(length - 9, length):  # at 144 tokens they fill a page and a chunk
            write(other, Piece(5, start, 1, False))
        assert all(map(torch.equal, remembered(other, 5, length), expected))


def test_the_index_on_cpu_stores_the_same() -> None:
    """Of every page and chunk that a window may retrieve."""
    world = World("hcam", options=OPTIONS)
    pieces = [Piece(7, 201, 1, False)]
    world.fill(pieces)
    world.enter(pieces)
    world.expected(pieces)
    assert world.cpu_layer is not None
    index = world.cpu_layer.index
    assert isinstance(index, ChunkMeanIndex)
    far_end = (201 + 1 - 32) // PAGE
    pages = torch.tensor(world.pages[7][1:far_end])
    means, theirs = memory_of(world).means.cpu()[pages], index.means[pages]
    # Sums of float32 come in another order, which can fall on the other side of a rounding.
    torch.testing.assert_close(means.float(), theirs.float(), rtol=2.0**-7, atol=1e-6)
    assert (means == theirs).float().mean() > 0.99
    # Chunks begin at even pages, the first behind the sink is 2; page 10 is the last far one.
    ends = torch.tensor(world.pages[7])[3:far_end:2]
    assert len(ends) == 4
    chunks = memory_of(world).chunks.cpu()[ends]
    torch.testing.assert_close(chunks.float(), index.chunks[ends].float(), rtol=2.0**-6, atol=1e-6)


@pytest.mark.parametrize("shared", [5, 6])
def test_a_prefix_hit(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that part inside a chunk, or behind one, have the chunks of both texts."""
    world = World("hcam", options=OPTIONS)
    stand_in(monkeypatch, world.shape)
    mine, tokens = world.content(1), shared * PAGE
    world.fill([Piece(1, 229, 1, False)])
    both = zip(mine, world.content(4), strict=True)
    world._content[4] = Content(*(torch.cat([a[:tokens], b[tokens:]]) for a, b in both))
    world.pages[4] = world.pages[1][:shared]
    write(world, Piece(4, tokens, 230 - tokens, True), Piece(1, 229, 1, False))
    alone = World("hcam", options=OPTIONS)
    alone._content[4] = world._content[4]
    alone.fill([Piece(4, 230, 1, False)])
    assert all(map(torch.equal, remembered(world, 4, 230), remembered(alone, 4, 230)))
    assert agrees(world, [Piece(4, 230, 1, False), Piece(1, 230, 1, False)])


def test_a_prefix_of_a_request_of_the_same_step() -> None:
    """VLLM hands out blocks that the step itself fills; chunks are of both."""
    world = World("hcam", options=OPTIONS)
    world.slots(1, 0, 48)
    world.pages[4] = world.pages[1][:3]
    world.content_of[4] = 1
    write(world, Piece(4, 48, 40, True), Piece(1, 0, 48, True))
    alone = World("hcam", options=OPTIONS)
    alone.fill([Piece(1, 88, 1, False)])
    assert all(map(torch.equal, remembered(world, 4, 88), remembered(alone, 1, 88)))


def test_pages_of_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they and their chunks said is forgotten by the time that anybody asks."""
    world = World("hcam", options=OPTIONS)
    stand_in(monkeypatch, world.shape)
    world.fill([Piece(5, 150, 1, False)])
    world.step([Piece(5, 150, 1, False)])
    before = world.pages.pop(5)
    world._free.extend(before)
    piece = Piece(6, 159, 1, False)
    world.fill([piece], 20)
    assert set(before) <= set(world.pages[6])
    assert agrees(world, [piece])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_key_that_is_no_number(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page and its chunk rank last, for the KV head that has it."""
    world = World("hcam", options=OPTIONS)
    stand_in(monkeypatch, world.shape)
    world.content(1).keys[70, 1, 5] = value
    pieces = [Piece(1, 230, 1, False), Piece(2, 190, 1, False)]
    world.fill(pieces)
    assert agrees(world, pieces)


def test_chunk_ends_of_a_batch() -> None:
    """Each once, whatever the requests' lengths; none where no chunk is complete."""
    device = torch.device("cpu")

    def ends(*pieces: tuple[int, int]) -> list[tuple[int, int]] | None:
        starts = np.cumsum([0, *(stop - start for start, stop in pieces)], dtype=np.int32)
        lens = np.array([stop for _, stop in pieces], np.int32)
        found = chunk_ends(Lengths(starts, lens, np.ones(len(lens), np.bool_)), 4, 3, device)
        if found is None:
            return None
        return list(zip(found.request.tolist(), found.end.tolist(), strict=True))

    assert ends((0, 11), (12, 13), (100, 107)) is None
    assert ends((11, 12), (12, 23), (0, 37)) == [(0, 3), (2, 3), (2, 6), (2, 9)]
