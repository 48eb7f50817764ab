"""vLLM's own kernel over kvplug's page table computes attention to the chosen pages.

The reference is plain torch in float64 over the pages that a row names, causal among the window's
own tokens. The kernel may err twice as much as plain torch in the same dtype does, plus a floor
for sums that come out exact. With every far page selected (forced: such windows take the stock
path otherwise), the result is stock attention over the same cache to the dtype's rounding (rule 2).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from kvplug.config import KvplugConfig
from kvplug.page_table import PageTable
from kvplug.pages import PageGeometry
from kvplug.pipeline import Plan
from kvplug.step import Step
from kvplug.windows import Windows, cut_windows
from kvplug.workspace import Workspace
from tests.made_up import Piece
from tests.steps import counts_of

BATCH = [
    Piece(0, 256, 192, True),  # whole windows
    Piece(1, 640, 77, True),  # the end of a prompt, inside a window and a page
    Piece(2, 901, 1, False),
    Piece(3, 333, 5, False),  # replayed
    Piece(4, 0, 65, True),  # dense beside sparse ones
    Piece(5, 130, 1, False),
]
DECODING = [Piece(0, 700, 1, False), Piece(1, 100, 1, False), Piece(2, 511, 1, False)]
BATCHES = {"mixed": BATCH, "decoding": DECODING}
HEADS = 3  # KV heads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny calls; and with two threads the kernel splits its work, so sums come in another order.

    Past torch's own function, which vLLM's worker replaces by a warning.
    """
    threads = torch.get_num_threads()
    torch._C.set_num_threads(1)
    yield
    torch._C.set_num_threads(threads)


class Shape(NamedTuple):
    """What the kernel is built for."""

    dtype: torch.dtype
    group: int
    dim: int
    page: int

    @property
    def isa(self) -> str:
        """The kernel that vLLM would choose."""
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        return _get_attn_isa(self.dtype, self.page, self.dim, "auto")


SHAPES = [
    pytest.param(Shape(dtype, group, dim, page), id=f"{str(dtype)[6:]}-G{group}-D{dim}-P{page}")
    for dtype in (torch.float32, torch.bfloat16)
    for group, dim, page in ((1, 64, 32), (2, 64, 64), (4, 64, 32), (1, 128, 64), (4, 128, 32))
]


class Cache(NamedTuple):
    """A filled cache, and what went into it."""

    keys: list[torch.Tensor]
    """Per request, ``[context, Hk, D]``."""
    values: list[torch.Tensor]
    packed: torch.Tensor
    """``[pages, Hk, P, 2 * D]`` as vLLM fills it."""
    block_table: torch.Tensor
    """``[B, max_pages]`` int32."""
    queries: torch.Tensor
    """``[T, H, D]``."""


@functools.lru_cache(maxsize=2)
def filled(shape: Shape, batch: str) -> Cache:
    """Writes random keys and values with vLLM's op, at shuffled pages; unused ones hold NaN."""
    from vllm import _custom_ops as ops

    torch.manual_seed(1)
    pieces = BATCHES[batch]
    counts = [-(-piece.stop // shape.page) for piece in pieces]
    order = torch.randperm(sum(counts)).to(torch.int32) + 1
    block_table = torch.zeros(len(pieces), max(counts), dtype=torch.int32)
    packed = torch.full((sum(counts) + 2, HEADS, shape.page, 2 * shape.dim), torch.nan)
    packed = packed.to(shape.dtype)
    key_cache, value_cache = packed.view(
        len(packed), HEADS, 2 * shape.page, shape.dim
    ).chunk(2, dim=2)  # fmt: skip
    keys, values = [], []
    for row, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
        mine, order = order[:count], order[count:]
        block_table[row, :count] = mine
        # A page's unwritten end holds what it held before: numbers, in a cache that is in use.
        key, value = torch.randn(2, count * shape.page, HEADS, shape.dim).to(shape.dtype)
        slots = (mine.long()[:, None] * shape.page + torch.arange(shape.page)).flatten()
        ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, shape.isa)
        keys.append(key[: piece.stop])
        values.append(value[: piece.stop])
    tokens = sum(piece.tokens for piece in pieces)
    queries = torch.randn(tokens, HEADS * shape.group, shape.dim).to(shape.dtype)
    return Cache(keys, values, packed, block_table, queries)


def plan_of(shape: Shape, cache: Cache, batch: str, everything: bool) -> tuple[Plan, Any]:
    """A plan with random far pages, or all of them, and the pages as ``[W][Hk]`` lists."""
    torch.manual_seed(2)
    pieces = BATCHES[batch]
    config = KvplugConfig.parse(
        {"window": 64, "budget": shape.page, "sink": shape.page, "local": 50, "dense_below": 140}
    )
    geometry = PageGeometry.of(config, shape.page, 1)
    starts = np.cumsum([0, *(piece.tokens for piece in pieces)], dtype=np.int32)
    ends = np.array([piece.stop for piece in pieces], np.int32)
    windows = cut_windows(starts, ends, np.array([p.prefilling for p in pieces]), geometry)
    assert windows.sparse.any()
    assert not windows.sparse.all()
    if everything:
        wanted = np.where(windows.sparse, windows.far_end - windows.far_begin, 0)
        windows = Windows(**{**windows._asdict(), "num_selected": wanted.astype(np.int32)})
        geometry = geometry._replace(most_pages=int(wanted.max()))
    step = Step(windows, cache.block_table, geometry.most_pages)
    table = PageTable(step, geometry, HEADS, Workspace())
    selected = torch.zeros((len(step.sparse_windows), HEADS, step.max_selected), dtype=torch.int32)
    chosen: dict[int, list[list[int]]] = {}
    for w, s in enumerate(step.sparse_windows):
        far = torch.arange(int(windows.far_begin[s]), int(windows.far_end[s]))
        chosen[s] = []
        for head in range(HEADS):
            pages = far[torch.randperm(len(far))[: windows.num_selected[s]]].sort().values
            selected[w, head, : len(pages)] = pages
            chosen[s].append(pages.tolist())
    table.write_selected(selected, counts_of(step, HEADS), False)
    return Plan(step, torch.empty(0, dtype=torch.int64), table), chosen


def attend(shape: Shape, cache: Cache, plan: Plan) -> torch.Tensor:
    """kvplug's attention: ``[T, H, D]``."""
    from kvplug.attention.attend.cpu import CpuAttend, SingleHeadCache

    kernel = CpuAttend(
        HEADS * shape.group, HEADS, shape.dim, shape.dtype, shape.isa, "auto"
    )  # fmt: skip
    output = torch.full_like(cache.queries, torch.nan)
    assert plan.table is not None
    kernel(
        cache.queries, output, SingleHeadCache.of(cache.packed), kernel.schedule(plan.table.rows()),
        Workspace(), shape.dim**-0.5, 0.0, (1.0, 1.0),
    )  # fmt: skip
    return output


def stock(shape: Shape, cache: Cache, batch: str) -> torch.Tensor:
    """vLLM's attention to everything, over the same cache: ``[T, H, D]``."""
    from vllm import _custom_ops as ops

    pieces = BATCHES[batch]
    starts = torch.tensor([0, *(p.tokens for p in pieces)]).cumsum(0).to(torch.int32)
    lengths = torch.tensor([piece.stop for piece in pieces], dtype=torch.int32)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(pieces), num_heads=HEADS * shape.group, num_kv_heads=HEADS,
        head_dim=shape.dim, seq_lens=lengths, dtype=shape.dtype, query_start_loc=starts,
        causal=True, sliding_window_size=-1, isa=shape.isa, enable_kv_split=True,
        kv_cache_dtype="auto",
    )  # fmt: skip
    keys, values = cache.packed.view(
        len(cache.packed), HEADS, 2 * shape.page, shape.dim
    ).chunk(2, dim=2)  # fmt: skip
    output = torch.full_like(cache.queries, torch.nan)
    ops.cpu_attention_with_kv_cache(
        query=cache.queries, key_cache=keys, value_cache=values, output=output,
        query_start_loc=starts, seq_lens=lengths, scale=shape.dim**-0.5, causal=True,
        alibi_slopes=None, sliding_window=-1, block_table=cache.block_table, softcap=0.0,
        scheduler_metadata=schedule, s_aux=None, kv_cache_dtype="auto",
    )  # fmt: skip
    return output


def reference(
    shape: Shape, cache: Cache, plan: Plan, chosen: Any, dtype: torch.dtype
) -> torch.Tensor:
    """Plain torch, window by window and head by head, every operation in ``dtype``."""
    windows = plan.step.windows
    queries = cache.queries.to(dtype).unflatten(1, (HEADS, shape.group))
    output = torch.empty_like(queries)
    for s in range(len(windows)):
        row, start = int(windows.request[s]), int(windows.token_start[s])
        count, end = int(windows.num_tokens[s]), int(windows.context_end[s])
        for head in range(HEADS):
            seen = torch.ones(end, dtype=torch.bool)
            if windows.sparse[s]:
                far = torch.zeros(end, dtype=torch.bool)
                far[windows.far_begin[s] * shape.page : windows.far_end[s] * shape.page] = True
                picked = torch.isin(torch.arange(end) // shape.page, torch.tensor(chosen[s][head]))
                seen = ~far | picked
            later = torch.arange(end) > torch.arange(end - count, end)[:, None]
            key = cache.keys[row][:end, head].to(dtype)
            value = cache.values[row][:end, head].to(dtype)
            mine = queries[start : start + count, head]  # [count, G, D]
            logits = torch.einsum("cgd,td->gct", mine, key) * shape.dim**-0.5
            weights = logits.masked_fill(later | ~seen, -torch.inf).softmax(-1)
            attended = torch.einsum("gct,td->cgd", weights, value)
            output[start : start + count, head] = attended
    return output.flatten(1, 2)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_to_the_chosen_pages(shape: Shape, batch: str) -> None:
    cache = filled(shape, batch)
    plan, chosen = plan_of(shape, cache, batch, everything=False)
    exact = reference(shape, cache, plan, chosen, torch.float64)
    plain = (reference(shape, cache, plan, chosen, shape.dtype).double() - exact).abs().max()
    error = (attend(shape, cache, plan).double() - exact).abs().max()
    assert error <= 2 * plain + 1e-6
    # The pages matter: attention to everything is far away.
    assert (stock(shape, cache, batch).double() - exact).abs().max() > 20 * plain


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_page_selected_is_stock_attention(shape: Shape, batch: str) -> None:
    cache = filled(shape, batch)
    plan, chosen = plan_of(shape, cache, batch, everything=True)
    ours, theirs = attend(shape, cache, plan), stock(shape, cache, batch)
    # Both add float32 terms in some order, then round once to the dtype: one step of it apart,
    # and 1e-6 where outputs of order 1 cancel.
    step = torch.finfo(shape.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=step, atol=2e-6)
    exact = reference(shape, cache, plan, chosen, torch.float64)
    plain = (reference(shape, cache, plan, chosen, shape.dtype).double() - exact).abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * plain + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_may_be_a_part_of_a_wider_tensor(dtype: torch.dtype) -> None:
    """vLLM hands the queries over as columns of one fused projection."""
    shape = Shape(dtype, 2, 64, 32)
    cache = filled(shape, "mixed")
    plan, _ = plan_of(shape, cache, "mixed", everything=False)
    fused = torch.cat([cache.queries.flatten(1), torch.zeros(len(cache.queries), 100)], dim=1)
    part = fused.to(dtype)[:, : HEADS * 2 * 64].unflatten(1, (HEADS * 2, 64))
    assert not part.is_contiguous()
    ours = attend(shape, cache._replace(queries=part), plan)
    torch.testing.assert_close(ours, attend(shape, cache, plan), rtol=0, atol=1e-6)
