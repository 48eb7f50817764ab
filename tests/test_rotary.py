"""Moving rotated vectors is rotating them there, for every kind of table; and pages are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.page_reader import PageReader
from kvplug.rotary import FixedPositions, PageNumbers, Rotary
from kvplug.workspace import Workspace
from tests.made_up import reader_of


def rotary_of(width: int, *, is_neox: bool, magnitude: float, dtype: torch.dtype) -> Rotary:
    angle = torch.arange(300)[:, None] * 1e4 ** (-torch.arange(0, width, 2).double() / width)
    table = magnitude * torch.cat([angle.cos(), angle.sin()], 1)
    return Rotary(table.to(dtype), is_neox)


def rotated(rotary: Rotary, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``[n, D]`` float64, by vLLM's own twin of its rotary kernels."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    rows, _ = RotaryEmbedding.forward_static(
        positions, vectors.double(), None, vectors.shape[1], rotary.width, rotary.table.double(),
        rotary.is_neox,
    )  # fmt: skip
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1.4])
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("width", [16, 6, 2])
def test_a_moved_vector_is_one_that_was_rotated_there(
    width: int, is_neox: bool, magnitude: float, dtype: torch.dtype
) -> None:
    rotary = rotary_of(width, is_neox=is_neox, magnitude=magnitude, dtype=dtype)
    plain = torch.randn(7, 16)
    start, target = torch.randint(300, (2, 7))
    vectors = rotated(rotary, plain, start)
    turn = rotary.turn(start, target, torch.float64)
    assert rotary.apply(vectors, turn) is vectors
    torch.testing.assert_close(vectors, rotated(rotary, plain, target), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("count", "heads", "width"), [(1, 1, 16), (33, 3, 6), (300, 2, 16)])
def test_the_compiled_twin(
    count: int, heads: int, width: int, is_neox: bool, dtype: torch.dtype
) -> None:
    rotary = rotary_of(width, is_neox=is_neox, magnitude=1.4, dtype=dtype)
    vectors, at = torch.randn(count, heads, 16), torch.randint(300, (count,))
    expected = rotary.apply(vectors.clone(), rotary.turn(at[:, None], torch.tensor(77)))
    assert rotary.move(vectors, at, 77) is vectors
    torch.testing.assert_close(vectors, expected, rtol=1e-6, atol=1e-6)


def test_behind_the_tables_end_stands_the_end() -> None:
    """Unwritten tokens of a last page: whatever comes of them, memory behind it is not read."""
    rotary = rotary_of(16, is_neox=True, magnitude=1.0, dtype=torch.float32)
    vectors = torch.randn(2, 1, 16)
    expected = rotary.move(vectors.clone(), torch.tensor([299, 299]), 3)
    assert torch.equal(rotary.move(vectors.clone(), torch.tensor([300, 10**9]), 3), expected)
    turn = rotary.turn(torch.tensor([300, 331]), torch.tensor(3))
    assert torch.equal(turn.cos[0], rotary.turn(torch.tensor(299), torch.tensor(3)).cos)


def test_there_and_back() -> None:
    rotary = rotary_of(16, is_neox=True, magnitude=1.0, dtype=torch.bfloat16)
    vectors, at = torch.randn(5, 16), torch.arange(5) * 70
    moved = rotary.apply(vectors.clone(), rotary.turn(at, torch.tensor(11)))
    back = rotary.apply(moved, rotary.turn(torch.full((5,), 11), at))
    torch.testing.assert_close(back, vectors, rtol=0, atol=1e-5)


def note(numbers: PageNumbers, tables: list[list[int]], lengths: list[int]) -> None:
    numbers.note(np.array(tables, np.int32), np.array(lengths, np.int32))


def test_pages_are_numbered_by_their_contexts() -> None:
    numbers = PageNumbers(10, 4)
    note(numbers, [[7, 2, 5, 0], [7, 3, 0, 0]], [9, 8])
    assert numbers.positions(torch.tensor([7, 2, 5, 3]))[:, 0].tolist() == [0, 4, 8, 4]
    note(numbers, [[5, 9]], [5])
    assert numbers.positions(torch.tensor([[5, 9]])).tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]


@pytest.mark.parametrize("as_rows", [False, True], ids=["transposed", "rows"])
def test_a_reader_of_fixed_positions_gives_keys_at_zero(as_rows: bool) -> None:
    page, heads, dim = 4, 3, 16
    rotary = rotary_of(dim, is_neox=True, magnitude=1.0, dtype=torch.float32)
    numbers = PageNumbers(5, page)
    note(numbers, [[3, 1, 4]], [12])
    plain = torch.randn(3 * page, heads, dim)
    at = torch.arange(3 * page)
    keys = torch.stack([rotated(rotary, plain[:, h], at) for h in range(heads)], 1).float()
    cache = torch.zeros(5, heads, dim, page)
    cache[[3, 1, 4]] = keys.unflatten(0, (3, page)).permute(0, 2, 3, 1)
    fixed = FixedPositions(rotary, numbers, 50)
    reader: PageReader = fixed.reader(reader_of(cache.view(5 * heads, 1, page, dim)), heads)
    rows = torch.tensor([3, 1, 4])[:, None] * heads + torch.arange(heads)
    chosen = reader.transposed() if as_rows else reader
    found = chosen.read(rows.flatten(), Workspace())
    found = found if as_rows else found.mT
    expected = plain.unflatten(0, (3, page)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
