"""The best far pages of every window and KV head, written as rows of the page table.

The twin on CPU is :class:`kvplug.select.top_pages.TopPages`: NaN and infinities rank below every
number, of equal scores the newest page wins, and exactly ``min(K, far pages)`` pages are taken, in
ascending order.

The threshold is found by radix selection: scores become unsigned integers that order alike, and
four passes count one digit of 8 bits each among the scores that share the digits before it. A last
pass writes the pages that reach the threshold. So a program reads its row of scores five times,
once from device memory and four times from the cache, in blocks: 5 * N / 2,048 steps.

Rows longer than :data:`CHUNK` are cut: each chunk keeps its own best K, of which the same kernel
then takes the best. What is among the best K of all is among the best K of its chunk, and chunks
lie in order, so the result is the same. One window of 1,048,576 tokens in pages of 32 is thus read
by 8 programs a head, of 10 steps each, instead of by one of 80.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.page_rows import (
    BLOCK,
    Contexts,
    PageRows,
    page_rows_reference,
    write_ends,
)

BLOCK_N = 2048
"""Scores that a program looks at in a step. Not measured: no GPU was at hand."""
CHUNK = 4096
"""Scores that one program ranks by itself. Not measured: no GPU was at hand."""


@triton.jit
def order_of(b_scores):  # type: ignore[no-untyped-def]
    """An unsigned integer that orders as the float32 does; 0 if it is no finite number."""
    bits = b_scores.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)  # -0.0 equals 0.0
    order = tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(bits & 0x7F800000 == 0x7F800000, 0, order).to(tl.uint32)


@triton.jit
def _entries(  # type: ignore[no-untyped-def]
    p_scores, p_candidates, o_e, total, limit, wanted, most, CHUNK: tl.constexpr
):
    """Far pages, orders and mask of entries ``o_e``: the pages themselves, or chunks' candidates.

    Chunk ``c`` has ``min(wanted, its pages)`` candidates of ``most`` places.
    """
    m_e = o_e < total
    b_n = o_e
    if p_candidates is not None:
        in_chunk = tl.minimum(limit - o_e // most * CHUNK, CHUNK)
        m_e &= o_e % most < tl.minimum(in_chunk, wanted)
        b_n = tl.load(p_candidates + o_e, mask=m_e, other=0)
    return b_n, order_of(tl.load(p_scores + b_n, mask=m_e, other=0.0)), m_e


@triton.jit
def threshold_of(  # type: ignore[no-untyped-def]
    p_scores, p_candidates, total, limit, wanted, most, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What the ``wanted`` largest orders reach, and how many equal to it are not wanted."""
    o_bin = tl.arange(0, 256)
    threshold = tl.full([], 0, tl.uint32)
    remaining, skip = wanted, wanted * 0
    for i in range(4):
        shift = 24 - 8 * i
        b_counts = tl.zeros([256], dtype=tl.int32)
        for e in range(0, total, BLOCK_N):
            o_e = e + tl.arange(0, BLOCK_N)
            _, b_order, m_e = _entries(
                p_scores, p_candidates, o_e, total, limit, wanted, most, CHUNK
            )
            m_e &= ((b_order ^ threshold) >> 8) >> shift == 0
            b_digit = ((b_order >> shift) & 255).to(tl.int32)
            b_counts += tl.histogram(b_digit, 256, mask=m_e)
        b_reach = tl.sum(b_counts, 0) - tl.cumsum(b_counts, 0) + b_counts  # of a digit or more
        digit = tl.sum((b_reach >= remaining).to(tl.int32), 0) - 1
        equal = tl.sum(tl.where(o_bin == digit, b_counts, 0), 0)
        remaining -= tl.sum(tl.where(o_bin == digit, b_reach, 0), 0) - equal
        skip = equal - remaining
        threshold |= digit.to(tl.uint32) << shift
    return threshold, skip


@triton.jit
def is_wanted(b_order, m_e, threshold, skip, seen):  # type: ignore[no-untyped-def]
    """Which entries :func:`threshold_of` reaches, and how many equal to it were seen up to here.

    ``seen`` is that number before these entries; the oldest ``skip`` of the equal are too many.
    """
    b_equal = (m_e & (b_order == threshold)).to(tl.int32)
    m_newest = (b_equal == 1) & (seen + tl.cumsum(b_equal, 0) > skip)
    return m_e & ((b_order > threshold) | m_newest), seen + tl.sum(b_equal, 0)


@triton.jit
def _take_best(  # type: ignore[no-untyped-def]
    p_scores, p_candidates, p_pages, p_out, first, total, limit, wanted, most,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes the ``wanted`` best of ``limit`` far pages, ascending, the first being ``first``.

    As physical pages, or where ``p_pages`` is None as far pages.
    """
    threshold, skip = tl.full([], 0, tl.uint32), wanted * 0
    if wanted < limit:
        threshold, skip = threshold_of(
            p_scores, p_candidates, total, limit, wanted, most, CHUNK, BLOCK_N
        )
    filled, seen = wanted * 0, wanted * 0
    for e in range(0, total, BLOCK_N):
        o_e = e + tl.arange(0, BLOCK_N)
        b_n, b_order, m_e = _entries(p_scores, p_candidates, o_e, total, limit, wanted, most, CHUNK)
        m_take, seen = is_wanted(b_order, m_e, threshold, skip, seen)
        b_take = m_take.to(tl.int32)
        o_out = filled + tl.cumsum(b_take, 0) - 1
        b_pages = first + b_n
        if p_pages is not None:
            b_pages = tl.load(p_pages + b_pages, mask=m_take)
        tl.store(p_out + o_out, b_pages, mask=m_take)
        filled += tl.sum(b_take, 0)


@triton.jit
def _wanted(p_wanted, num_wanted, i_row, limit):  # type: ignore[no-untyped-def]
    """Pages to take of ``limit``."""
    if p_wanted is not None:
        num_wanted = tl.load(p_wanted + i_row)
    return tl.maximum(tl.minimum(num_wanted, limit), 0)


@triton.jit
def _candidates_kernel(  # type: ignore[no-untyped-def]
    p_scores, p_wanted, p_begin, p_end, p_candidates, num_wanted, num_pages, most,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The best pages of one chunk of a row."""
    i_c, i_s = tl.program_id(0), tl.program_id(2)
    i_row = (i_s * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    first = i_c * CHUNK
    limit = tl.load(p_end + i_s) - tl.load(p_begin + i_s) - first
    limit = tl.minimum(limit, CHUNK)
    wanted = tl.minimum(_wanted(p_wanted, num_wanted, i_row, limit), most)
    if wanted <= 0:
        return
    p_out = p_candidates + (i_row * tl.num_programs(0) + i_c) * most
    _take_best(
        p_scores + i_row * num_pages + first, None, None, p_out, first, limit, limit, wanted, most,
        CHUNK, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _top_pages_kernel(  # type: ignore[no-untyped-def]
    p_scores, p_wanted, p_candidates, p_table, p_request, p_begin, p_end, p_context, p_rows,
    p_lengths, table_stride, num_wanted, num_pages, most, page, width,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One row of the page table."""
    i_s = tl.program_id(0)
    i_row = (i_s * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    begin, end = tl.load(p_begin + i_s), tl.load(p_end + i_s)
    limit = end - begin
    wanted = _wanted(p_wanted, num_wanted, i_row, limit)
    total = limit
    if p_candidates is not None:
        wanted = tl.minimum(wanted, most)
        total = tl.cdiv(limit, CHUNK) * most
        p_candidates += i_row * tl.cdiv(num_pages, CHUNK) * most
    p_pages = p_table + tl.load(p_request + i_s).to(tl.int64) * table_stride
    p_row = p_rows + i_row * width
    fits = write_ends(
        p_pages, p_row, p_lengths + i_row, begin, end, tl.load(p_context + i_s), wanted, page,
        width, BLOCK_W,
    )  # fmt: skip
    if fits & (wanted > 0):
        _take_best(
            p_scores + i_row * num_pages, p_candidates, p_pages, p_row + begin, begin, total,
            limit, wanted, most, CHUNK, BLOCK_N,
        )  # fmt: skip


def candidates_shape(
    windows: int, heads: int, num_pages: int, most: int
) -> tuple[int, int, int, int] | None:
    """Shape of the scratch that :func:`top_pages` needs; None: none.

    Args:
        windows: S.
        heads: Hk.
        num_pages: N.
        most: Most pages that a row takes.
    """
    if num_pages <= CHUNK:
        return None
    return windows, heads, -(-num_pages // CHUNK), min(max(most, 1), num_pages)


def top_pages(
    scores: torch.Tensor, wanted: torch.Tensor | int, contexts: Contexts, rows: PageRows,
    candidates: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Selects far pages and writes the rows ``sinks | selected, ascending | local``.

    A row that does not fit W pages gets a length of 0. What is behind a row's pages is left alone.

    Args:
        scores: ``[S, Hk, N]`` float32 of the far pages in order; what is behind them is not read.
        wanted: K, or ``[S, Hk]`` int32, pages to select where there are as many.
        contexts: The windows' contexts, of at most N far pages each. A dense window has none, and
            all of its pages are sinks or local.
        rows: Written.
        candidates: ``[S, Hk, chunks, most]`` int32 scratch of the shape that
            :func:`candidates_shape` says; no row takes more than ``most`` pages. Needed where it
            is not None.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or the page size is not
            supported.
    """
    check("scores", scores, ("S", "Hk", "N"), torch.float32)
    windows, heads, pages = scores.shape
    check("context_end", contexts.context_end, (windows,), torch.int32)
    contexts.check(heads, rows)
    is_counted = isinstance(wanted, torch.Tensor)
    if isinstance(wanted, torch.Tensor):
        check("wanted", wanted, (windows, heads), torch.int32)
        check_devices(scores=scores, wanted=wanted)
    check_devices(scores=scores, table=rows.table)
    chunks = -(-pages // CHUNK)
    if chunks > 1:
        require(candidates is not None, f"More than {CHUNK} far pages need candidates.")
    else:
        candidates = None
    counts, constant = (wanted, 0) if is_counted else (None, wanted)
    most = 1
    if not windows:
        return
    if candidates is not None:
        check("candidates", candidates, (windows, heads, chunks, "most"), torch.int32)
        check_devices(scores=scores, candidates=candidates)
        most = candidates.shape[3]
        require(
            most >= min(constant, pages),
            f"candidates has {most} places for {constant} pages of each chunk.",
        )
        _candidates_kernel[(chunks, heads, windows)](
            scores, counts, contexts.far.begin, contexts.far.end, candidates, constant, pages,
            most, CHUNK=CHUNK, BLOCK_N=BLOCK_N, num_warps=8,
        )  # fmt: skip
    _top_pages_kernel[(windows, heads)](
        scores, counts, candidates, *contexts.far, contexts.context_end, *rows,
        contexts.far.block_table.stride(0), constant, pages, most, contexts.page,
        rows.table.shape[1], CHUNK=CHUNK, BLOCK_N=BLOCK_N, BLOCK_W=BLOCK, num_warps=8,
    )  # fmt: skip


def top_pages_reference(
    scores: torch.Tensor, wanted: torch.Tensor | int, contexts: Contexts, rows: PageRows,
    candidates: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Twin of :func:`top_pages` in plain torch, which needs no scratch."""
    windows, heads, pages = scores.shape
    counts = torch.zeros(windows, heads, dtype=torch.int32, device=scores.device)
    counts += wanted
    selected = torch.zeros(windows, heads, pages, dtype=torch.int32, device=scores.device)
    far = contexts.far
    for s, (begin, end) in enumerate(zip(far.begin.tolist(), far.end.tolist(), strict=True)):
        counts[s].clamp_(max=end - begin)
        mine = scores[s, :, : end - begin]
        ranked = mine.where(mine.isfinite(), -torch.inf).flip(1)
        order = ranked.sort(dim=1, descending=True, stable=True).indices
        for head, count in enumerate(counts[s].tolist()):
            best = end - 1 - order[head, :count]
            selected[s, head, :count] = best.sort().values
    page_rows_reference(selected, counts, contexts, rows)


_ENDS = "*i32 *i32 *i32 *i32 *i32 *i32 *i32 i32 i32 i32 i32 i32 i32"
_SIZES = {"CHUNK": CHUNK, "BLOCK_N": BLOCK_N}
COMPILED = (
    Variant(
        _candidates_kernel, "*fp32 *i32 *i32 *i32 i32 i32 i32", {"p_wanted": None} | _SIZES,
        num_warps=8,
    ),
    Variant(
        _top_pages_kernel, f"*fp32 *i32 *i32 {_ENDS}", _SIZES | {"BLOCK_W": BLOCK}, num_warps=8
    ),
    Variant(
        _top_pages_kernel, f"*fp32 {_ENDS}",
        {"p_wanted": None, "p_candidates": None, "BLOCK_W": BLOCK} | _SIZES, num_warps=8,
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
