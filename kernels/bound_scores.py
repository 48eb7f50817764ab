"""Scores of pages by a summary of their keys: an upper bound of their logits, or their mean's.

The twins on CPU are :class:`kvplug.index.minmax.MinMaxIndex` (Quest, Tang et al. 2024, 2406.10774)
with ``scale * max over probes of sum_d max(q_d min_d, q_d max_d)``, and the pages' level of
:class:`kvplug.index.chunk_mean.ChunkMeanIndex` with ``scale * max over probes of q . mean``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import FLOATS, check, check_devices, check_head_dim
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.far_pages import FarPages, far_limit, far_pages

BLOCK = 4096
"""Numbers of a summary that a program keeps in registers while every probe passes over them."""


@triton.jit
def _summary_scores_kernel(  # type: ignore[no-untyped-def]
    p_summaries, p_vectors, p_counts, p_table, p_request, p_begin, p_end, p_scores,
    table_stride, num_probes, num_pages, scale,
    BOUNDS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N pages of one head and window, each summary loaded once."""
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = (i_s * tl.num_programs(1) + i_h).to(tl.int64)
    o_n, o_d = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    p_out = p_scores + i_row * num_pages + o_n
    limit = far_limit(p_counts, p_begin, p_end, i_s)
    if i_n * BLOCK_N >= limit:
        tl.store(p_out, float("-inf"), mask=o_n < num_pages)
        return
    m_n, m_d = o_n < limit, o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    b_pages = far_pages(p_table, p_request, p_begin, table_stride, i_s, o_n, m_n)  # [BN]
    o_row = (b_pages * tl.num_programs(1) + i_h) * (2 * D if BOUNDS else D)
    p_row = p_summaries + o_row[:, None] + o_d[None, :]  # [BN, BD]
    b_low = tl.load(p_row, mask=m_nd, other=0.0).to(tl.float32)
    b_high = b_low
    if BOUNDS:
        b_high = tl.load(p_row + D, mask=m_nd, other=0.0).to(tl.float32)
    # A bound is least before the first probe; a mean's score is unknown.
    b_best = tl.full([BLOCK_N], float("-inf") if BOUNDS else float("nan"), tl.float32)
    for i_r in range(tl.load(p_counts + i_s)):
        p_vector = p_vectors + (i_row * num_probes + i_r) * D + o_d
        b_query = tl.load(p_vector, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [1, BD]
        b_products = b_query * b_low  # [BN, BD]
        if BOUNDS:
            b_products = tl.maximum(b_products, b_query * b_high)
        b_logits = tl.sum(b_products, 1)  # [BN]
        m_better = (b_logits > b_best) | (b_best != b_best)
        b_best = tl.where(m_better, b_logits, b_best)
    b_scores = tl.where(m_n, scale * b_best, float("-inf"))
    tl.store(p_out, b_scores, mask=o_n < num_pages)


def _launch(
    summaries: torch.Tensor, is_bounds: bool, vectors: torch.Tensor, counts: torch.Tensor,
    far: FarPages, scale: float, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Checks what both launchers share, and runs the kernel."""
    heads, dim = summaries.shape[1], summaries.shape[-1]
    far.check(counts, scores, heads)
    windows, _, pages = scores.shape
    check_head_dim(dim)
    check("vectors", vectors, (windows, heads, "R", dim), FLOATS)
    check_devices(summaries=summaries, vectors=vectors, scores=scores)
    if not scores.numel():
        return
    block_d = triton.next_power_of_2(dim)
    block_n = BLOCK // block_d
    _summary_scores_kernel[(triton.cdiv(pages, block_n), heads, windows)](
        summaries, vectors, counts, *far, scores,
        far.block_table.stride(0), vectors.shape[2], pages, scale,
        BOUNDS=is_bounds, D=dim, BLOCK_N=block_n, BLOCK_D=block_d,
    )  # fmt: skip


def bound_scores(
    bounds: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor, far: FarPages,
    scale: float, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Scores far pages by the largest bound of any probe; a row's rest becomes minus infinity.

    A bound that is NaN counts as minus infinity.

    Args:
        bounds: ``[pages, Hk, 2, D]`` bfloat16, minima, then maxima.
        vectors: ``[S, Hk, R, D]`` bfloat16, float16 or float32 probes.
        counts: ``[S]`` int32 probes of each window, at most R; with 0 its row is minus infinity.
        far: The far pages, at most N a window.
        scale: Of the layer's logits.
        scores: ``[S, Hk, N]`` float32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    check("bounds", bounds, ("pages", "Hk", 2, "D"), torch.bfloat16)
    _launch(bounds, True, vectors, counts, far, scale, scores)


def mean_scores(
    means: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor, far: FarPages,
    scale: float, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Scores far pages by the largest logit of their mean; a row's rest becomes minus infinity.

    A score is NaN only if every probe's logit is.

    Args:
        means: ``[pages, Hk, D]`` bfloat16.
        vectors: ``[S, Hk, R, D]`` bfloat16, float16 or float32 probes.
        counts: ``[S]`` int32 probes of each window, at most R; with 0 its row is minus infinity.
        far: The far pages, at most N a window.
        scale: Of the layer's logits.
        scores: ``[S, Hk, N]`` float32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    check("means", means, ("pages", "Hk", "D"), torch.bfloat16)
    _launch(means, False, vectors, counts, far, scale, scores)


def bound_scores_reference(
    bounds: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor, far: FarPages,
    scale: float, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`bound_scores` in plain torch; float64 scores are computed in float64."""
    scores.fill_(-torch.inf)
    for s, count in enumerate(counts.tolist()):
        if count:
            pages = far.pages(s)
            low, high = bounds[pages].to(scores.dtype).permute(2, 1, 0, 3)[:, :, None]
            query = vectors[s, :, :count, None].to(scores.dtype)  # [Hk, R, 1, D]
            logits = torch.maximum(query * low, query * high).sum(-1)  # [Hk, R, N]
            logits = logits.nan_to_num(-torch.inf, torch.inf, -torch.inf)
            scores[s, :, : len(pages)] = scale * logits.amax(1)


def mean_scores_reference(
    means: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor, far: FarPages,
    scale: float, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`mean_scores` in plain torch; float64 scores are computed in float64."""
    scores.fill_(-torch.inf)
    for s, count in enumerate(counts.tolist()):
        if count:
            pages = far.pages(s)
            mean = means[pages].to(scores.dtype)
            logits = torch.einsum("hrd,nhd->hrn", vectors[s, :, :count].to(scores.dtype), mean)
            best = logits.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1)
            unknown = logits.isnan().all(1)
            scores[s, :, : len(pages)] = scale * best.masked_fill(unknown, torch.nan)


COMPILED = tuple(
    Variant(
        _summary_scores_kernel,
        f"*bf16 *{dtype} *i32 *i32 *i32 *i32 *i32 *fp32 i32 i32 i32 fp32",
        {
            "BOUNDS": is_bounds, "D": dim, "BLOCK_N": BLOCK // triton.next_power_of_2(dim),
            "BLOCK_D": triton.next_power_of_2(dim),
        },
    )
    for dtype, dim, is_bounds in [("bf16", 128, True), ("fp32", 80, True), ("fp32", 128, False)]
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
