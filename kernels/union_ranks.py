"""Ranks of far pages where an index's best and the pages of largest mass share a row.

The twin on CPU is :class:`kvplug.select.union.Union` (after HAX, arXiv 2507.00449). A page is a hit
where its score is a number above 0. The best hits, of equal ones the newest, rank above everything;
other pages rank by their mass. So whoever takes the best of a row by rank takes each page once, and
of both kinds as many as the row has room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.far_pages import FarPages
from kvplug.kernels.top_pages import CHUNK, is_wanted, order_of, threshold_of

BLOCK_N = 1024
"""Scores that a program looks at in a step; with 2,048 registers are spilled on sm_90."""
MOST = tl.constexpr(torch.finfo(torch.float32).max)
"""The rank of a hit: no mass is as large."""
ZERO = tl.constexpr(0x80000000)
"""The order of 0."""
NONE = tl.constexpr(0xFFFFFFFF)
"""An order that no number has."""


@triton.jit
def _union_ranks_kernel(  # type: ignore[no-untyped-def]
    p_scores, p_share, p_mass, p_table, p_request, p_begin, p_end, p_ranks,
    table_stride, share, num_pages, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row."""
    i_s, i_h, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    i_row = (i_s * heads + i_h).to(tl.int64)
    begin = tl.load(p_begin + i_s)
    limit = tl.load(p_end + i_s) - begin
    p_row = p_scores + i_row * num_pages
    p_pages = p_table + tl.load(p_request + i_s).to(tl.int64) * table_stride + begin
    hits = limit * 0
    for e in range(0, limit, BLOCK_N):
        o_e = e + tl.arange(0, BLOCK_N)
        b_order = order_of(tl.load(p_row + o_e, mask=o_e < limit, other=0.0))
        hits += tl.sum((b_order > ZERO).to(tl.int32), 0)
    if p_share is not None:
        share = tl.load(p_share + i_row)
    wanted = tl.minimum(share, hits)
    threshold, skip = tl.full([], NONE, tl.uint32), limit * 0
    if wanted > 0:
        threshold, skip = threshold_of(p_row, None, limit, limit, wanted, 1, CHUNK, BLOCK_N)
    seen = limit * 0
    for e in range(0, limit, BLOCK_N):
        o_e = e + tl.arange(0, BLOCK_N)
        m_e = o_e < limit
        b_order = order_of(tl.load(p_row + o_e, mask=m_e, other=0.0))
        m_hit, seen = is_wanted(b_order, m_e, threshold, skip, seen)
        b_pages = tl.load(p_pages + o_e, mask=m_e, other=0).to(tl.int64)
        b_mass = tl.load(p_mass + b_pages * heads + i_h, mask=m_e, other=0.0)
        tl.store(p_ranks + i_row * num_pages + o_e, tl.where(m_hit, MOST, b_mass), mask=m_e)


def union_ranks(
    scores: torch.Tensor, share: torch.Tensor | int, mass: torch.Tensor, far: FarPages,
    ranks: torch.Tensor,
) -> None:  # fmt: skip
    """Ranks far pages; what is behind a row's pages is left alone.

    Args:
        scores: ``[S, Hk, N]`` float32 of the far pages in order; what is behind is not read.
        share: Hits that a row takes where there are as many, or ``[S, Hk]`` int32.
        mass: ``[pages, Hk]`` float32.
        far: The far pages, at most N a window.
        ranks: ``[S, Hk, N]`` float32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    check("scores", scores, ("S", "Hk", "N"), torch.float32)
    windows, heads, pages = scores.shape
    check("ranks", ranks, scores.shape, torch.float32)
    check("mass", mass, ("pages", heads), torch.float32)
    check("block_table", far.block_table, ("B", "max_pages"), torch.int32, contiguous=False)
    for name, column in zip(far._fields[1:], far[1:], strict=True):
        check(name, column, (windows,), torch.int32)
    constant = share if isinstance(share, int) else 0
    varying = None if isinstance(share, int) else share
    if varying is not None:
        check("share", varying, (windows, heads), torch.int32)
    check_devices(scores=scores, ranks=ranks, mass=mass, share=varying, **far._asdict())
    if not scores.numel():
        return
    _union_ranks_kernel[(windows, heads)](
        scores, varying, mass, *far, ranks, far.block_table.stride(0), constant, pages,
        CHUNK=CHUNK, BLOCK_N=BLOCK_N,
    )  # fmt: skip


def union_ranks_reference(
    scores: torch.Tensor, share: torch.Tensor | int, mass: torch.Tensor, far: FarPages,
    ranks: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`union_ranks` in plain torch."""
    shares = torch.zeros(scores.shape[:2], dtype=torch.int32, device=scores.device) + share
    for s in range(len(scores)):
        pages = far.pages(s)
        ranks[s, :, : len(pages)] = mass[pages].T
        for head, row in enumerate(scores[s, :, : len(pages)]):
            is_hit = row.isfinite() & (row > 0)
            order = row.where(is_hit, -1.0).flip(0).sort(descending=True, stable=True).indices
            best = len(row) - 1 - order[: min(int(shares[s, head]), int(is_hit.sum()))]
            ranks[s, head, best] = MOST.value


_FAR = "*fp32 *i32 *i32 *i32 *i32 *fp32 i32 i32 i32"
_SIZES = {"CHUNK": CHUNK, "BLOCK_N": BLOCK_N}
COMPILED = (
    Variant(_union_ranks_kernel, f"*fp32 *i32 {_FAR}", _SIZES),
    Variant(_union_ranks_kernel, f"*fp32 {_FAR}", {"p_share": None} | _SIZES),
)
"""For :mod:`kvplug.kernels.compile_check`."""
