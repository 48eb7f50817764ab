"""Attention at a fixed distance equals a dense reference that uses the same positions, in float64.

The reference rotates un-rotated queries and keys by the formula, pair by pair and distance by
distance; what it and the tested code share is the table of cosines and sines.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from kvplug.attention.attend.cpu import CpuAttend, SingleHeadCache
from kvplug.attention.attend.fixed import FixedAttend
from kvplug.pipeline import Plan
from kvplug.rotary import FixedPositions, PageNumbers, Rotary
from kvplug.workspace import Workspace
from tests.test_rewritten_attention import (
    BATCHES,
    HEADS,
    Cache,
    Shape,
    filled,
    one_thread,
    plan_of,
)

__all__ = ["one_thread"]
POSITIONS = 1024
DISTANCE = 50
"""The local region of the batches."""

SHAPES = [
    pytest.param(Shape(dtype, group, dim, page), id=f"{str(dtype)[6:]}-G{group}-D{dim}-P{page}")
    for dtype in (torch.float32, torch.bfloat16)
    for group, dim, page in ((1, 128, 64), (3, 80, 32))
]


class Kind(NamedTuple):
    """A rotary embedding."""

    width: float = 1.0
    """Share of the dimensions that is rotated."""
    is_neox: bool = True
    magnitude: float = 1.0
    table: torch.dtype = torch.float32

    def rotary(self, dim: int) -> Rotary:
        width = int(dim * self.width)
        frequency = 1e4 ** (-torch.arange(0, width, 2).double() / width)
        angle = torch.arange(POSITIONS)[:, None] * frequency
        table = torch.cat([angle.cos(), angle.sin()], 1) * self.magnitude
        return Rotary(table.to(self.table), self.is_neox)


KINDS = {
    "neox": Kind(),
    "interleaved": Kind(is_neox=False),
    "partial": Kind(width=0.5),
    "yarn": Kind(magnitude=1.3),
    "rounded table": Kind(table=torch.bfloat16),
}


def turned(vectors: torch.Tensor, rotary: Rotary, start: Any, target: Any) -> torch.Tensor:
    """``[..., D]`` float64: divided by one position's complex factor, multiplied by another's."""
    half = rotary.width // 2
    table = rotary.table.double()
    factor = torch.complex(table[:, :half], table[:, half:])
    spread, rest = vectors[..., : rotary.width].double(), vectors[..., rotary.width :].double()
    if rotary.is_neox:
        pairs = torch.complex(spread[..., :half].contiguous(), spread[..., half:].contiguous())
    else:
        pairs = torch.view_as_complex(spread.unflatten(-1, (half, 2)).contiguous())
    pairs = pairs / factor[start] * factor[target]
    if rotary.is_neox:
        return torch.cat([pairs.real, pairs.imag, rest], -1)
    return torch.cat([torch.view_as_real(pairs).flatten(-2), rest], -1)


def reference(
    shape: Shape, cache: Cache, plan: Plan, chosen: Any, rotary: Rotary, cap: float
) -> torch.Tensor:
    """``[T, H, D]`` float64; NaN where a window is not moved."""
    windows, page = plan.step.windows, shape.page
    queries = cache.queries.unflatten(1, (HEADS, shape.group))
    output = torch.full(queries.shape, torch.nan, dtype=torch.float64)
    for s in moved(plan):
        row, start = int(windows.request[s]), int(windows.token_start[s])
        count, end = int(windows.num_tokens[s]), int(windows.context_end[s])
        at = torch.arange(end)
        asked = torch.arange(end - count, end)
        for head in range(HEADS):
            seen = torch.ones(end, dtype=torch.bool)
            if windows.sparse[s]:
                is_far = (at >= windows.far_begin[s] * page) & (at < windows.far_end[s] * page)
                seen = ~is_far | torch.isin(at // page, torch.tensor(chosen[s][head]))
            key = cache.keys[row][:end, head]
            value = cache.values[row][:end, head].double()
            mine = queries[start : start + count, head]  # [count, G, D]
            near = torch.einsum("cgd,td->cgt", mine.double(), key.double())
            far_query = turned(mine, rotary, asked[:, None], DISTANCE)
            far = torch.einsum("cgd,td->cgt", far_query, turned(key, rotary, at, 0))
            distance = (asked[:, None] - at)[:, None]
            logits = near.where(distance < DISTANCE, far) * shape.dim**-0.5
            logits = cap * torch.tanh(logits / cap) if cap else logits
            weights = logits.masked_fill((distance < 0) | ~seen, -torch.inf).softmax(-1)
            output[start : start + count, head] = weights @ value
    return output.flatten(1, 2)


def moved(plan: Plan) -> list[int]:
    """Windows that are attended so: all but the short ones."""
    ends = plan.step.windows.context_end
    return [s for s in range(len(ends)) if ends[s] > 140]


def numbers_of(cache: Cache, batch: str, page: int) -> PageNumbers:
    numbers = PageNumbers(len(cache.packed), page)
    stops = np.array([piece.stop for piece in BATCHES[batch]], np.int32)
    numbers.note(cache.block_table.numpy(), stops)
    return numbers


def attended(
    shape: Shape, cache: Cache, plan: Plan, batch: str, rotary: Rotary, cap: float = 0.0,
    rounds: bool = False,
) -> torch.Tensor:  # fmt: skip
    """kvplug's: ``[T, H, D]``, 7 where a window is not moved."""
    kernel = CpuAttend(HEADS * shape.group, HEADS, shape.dim, shape.dtype, shape.isa, "auto")
    single = SingleHeadCache.of(cache.packed)
    keys, values = kernel.reader(single), kernel.value_reader(single)
    assert keys is not None
    assert values is not None
    assert plan.table is not None
    numbers = numbers_of(cache, batch, shape.page)
    positions = FixedPositions(rotary, numbers, DISTANCE)
    fixed = FixedAttend(keys, values, positions, shape.dim**-0.5, cap, rounds)
    output = torch.full_like(cache.queries, 7.0)
    fixed(cache.queries, output, plan.table, plan.table.table, moved(plan), Workspace())
    return output


def check(shape: Shape, batch: str, kind: Kind, *, everything: bool, cap: float = 0.0) -> None:
    cache, rotary = filled(shape, batch), kind.rotary(shape.dim)
    plan, chosen = plan_of(shape, cache, batch, everything=everything)
    expected = reference(shape, cache, plan, chosen, rotary, cap)
    found = attended(shape, cache, plan, batch, rotary, cap)
    mine = ~expected[:, 0, 0].isnan()
    assert mine.any()
    assert (found[~mine] == 7).all(), "other windows are not its business"
    # Float32 sums of some hundred terms, then rounded once to the dtype.
    step = torch.finfo(shape.dtype).eps
    torch.testing.assert_close(found[mine].double(), expected[mine], rtol=step, atol=4e-6)


@pytest.mark.parametrize("everything", [False, True], ids=["some", "everything"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_dense_reference(shape: Shape, batch: str, everything: bool) -> None:
    check(shape, batch, Kind(), everything=everything)


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_rotary_embeddings(name: str) -> None:
    check(Shape(torch.float32, 2, 64, 32), "mixed", KINDS[name], everything=False)
    check(Shape(torch.bfloat16, 2, 64, 32), "decoding", KINDS[name], everything=False)


@pytest.mark.parametrize("batch", BATCHES)
def test_rounded_factors_cost_what_bfloat16_costs(batch: str) -> None:
    """Queries, keys and weights of 8 bits each, where the CPU has what they are for."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    shape, kind = Shape(torch.bfloat16, 2, 64, 32), Kind(table=torch.bfloat16)
    cache, rotary = filled(shape, batch), kind.rotary(64)
    plan, chosen = plan_of(shape, cache, batch, everything=False)
    expected = reference(shape, cache, plan, chosen, rotary, 0.0)
    mine = ~expected[:, 0, 0].isnan()
    found = attended(shape, cache, plan, batch, rotary, rounds=True)[mine].double()
    step = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found, expected[mine], rtol=2 * step, atol=step)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_softcap() -> None:
    check(Shape(torch.float32, 2, 64, 32), "mixed", Kind(), everything=False, cap=2.0)


@pytest.mark.parametrize(("queries", "tokens"), [(7, 32), (64, 96), (1000, 5000)])
def test_blocks_do_not_matter(queries: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvplug.attention.attend.fixed.QUERIES", queries)
    monkeypatch.setattr("kvplug.attention.attend.fixed.TOKENS", tokens)
    check(Shape(torch.float32, 3, 64, 32), "mixed", Kind(), everything=True)
