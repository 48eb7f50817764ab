"""Scores of pages by one key that stands for each: sums or maxima over probes, of a head or of all.

The twin on CPU is :class:`kvplug.index.representative.RepresentativeIndex` (InfLLM, Xiao et al.
2024, arXiv 2402.04617). The sum of dot products is the dot product with the sum, so probes that
are added are added once for a block of pages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import FLOATS, check, check_devices, check_head_dim
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.far_pages import FarPages, far_limit, far_pages

BLOCK = 4096
"""Numbers of representatives that a program keeps in registers while every probe passes over."""


class Ranking(NamedTuple):
    """How pages are scored."""

    cosine: bool = False
    """By the cosine with each probe; else by the logit."""
    agree: bool = False
    """Whether all KV heads share the sum of their scores."""
    add: bool = True
    """Whether a head's probes are added; else the largest counts."""


@triton.jit
def _inverse_root(square):  # type: ignore[no-untyped-def]
    """One over the root, rounded once each; 0 for 0."""
    is_zero = square == 0
    root = tl.sqrt_rn(tl.where(is_zero, 1.0, square))
    return tl.where(is_zero, 0.0, tl.div_rn(tl.full(square.shape, 1.0, tl.float32), root))


@triton.jit
def _load_probe(  # type: ignore[no-untyped-def]
    p_probe, scale, COSINE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``[1, BD]`` a probe times the scale, or of length one."""
    o_d = tl.arange(0, BLOCK_D)
    b_probe = tl.load(p_probe + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    if COSINE:
        b_probe *= _inverse_root(tl.sum(b_probe * b_probe, 1))[:, None]
    else:
        b_probe *= scale
    return b_probe


@triton.jit
def _representative_scores_kernel(  # type: ignore[no-untyped-def]
    p_representatives, p_vectors, p_counts, p_table, p_request, p_begin, p_end, p_scores,
    table_stride, num_probes, num_pages, scale, heads,
    COSINE: tl.constexpr, AGREE: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N pages for one head, or for all that agree; each vector is loaded once."""
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_s.to(tl.int64) * heads
    o_n, o_d = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    limit, count = far_limit(p_counts, p_begin, p_end, i_s), tl.load(p_counts + i_s)
    m_n, m_d = o_n < limit, o_d < D
    until = heads if AGREE else i_h + 1
    b_total = tl.zeros([BLOCK_N], dtype=tl.float32)
    if i_n * BLOCK_N < limit:
        b_pages = far_pages(p_table, p_request, p_begin, table_stride, i_s, o_n, m_n)  # [BN]
        for h in range(i_h, until):
            p_rows = p_representatives + ((b_pages * heads + h) * D)[:, None] + o_d[None, :]
            b_rows = tl.load(p_rows, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            p_probes = p_vectors + (i_row + h) * num_probes * D
            if ADD:
                b_sum = tl.zeros([1, BLOCK_D], dtype=tl.float32)
                for i_r in range(count):
                    b_sum += _load_probe(p_probes + i_r * D, scale, COSINE, D, BLOCK_D)
                b_best = tl.sum(b_sum * b_rows, 1)  # [BN]
            else:
                b_best = tl.full([BLOCK_N], float("nan"), tl.float32)
                for i_r in range(count):
                    b_probe = _load_probe(p_probes + i_r * D, scale, COSINE, D, BLOCK_D)
                    b_product = tl.sum(b_probe * b_rows, 1)
                    m_better = (b_product > b_best) | (b_best != b_best)
                    b_best = tl.where(m_better, b_product, b_best)
            if COSINE:
                b_best *= _inverse_root(tl.sum(b_rows * b_rows, 1))
            b_total += b_best
    b_scores = tl.where(m_n, b_total, float("-inf"))
    for h in range(i_h, until):
        tl.store(p_scores + (i_row + h) * num_pages + o_n, b_scores, mask=o_n < num_pages)


def representative_scores(
    representatives: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor, far: FarPages,
    scale: float, ranking: Ranking, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Scores far pages by the keys that stand for them; a row's rest becomes minus infinity.

    A score is NaN where every product is, and where products are added, if one is.

    Args:
        representatives: ``[pages, Hk, D]`` bfloat16.
        vectors: ``[S, Hk, R, D]`` bfloat16, float16 or float32 probes.
        counts: ``[S]`` int32 probes of each window, at most R; with 0 its row is minus infinity.
        far: The far pages, at most N a window.
        scale: Of the layer's logits.
        ranking: How.
        scores: ``[S, Hk, N]`` float32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    heads, dim = representatives.shape[1:]
    far.check(counts, scores, heads)
    windows, _, pages = scores.shape
    check("representatives", representatives, ("pages", heads, dim), torch.bfloat16)
    check_head_dim(dim)
    check("vectors", vectors, (windows, heads, "R", dim), FLOATS)
    check_devices(representatives=representatives, vectors=vectors, scores=scores)
    if not scores.numel():
        return
    block_d = triton.next_power_of_2(dim)
    block_n = BLOCK // block_d
    grid = triton.cdiv(pages, block_n), 1 if ranking.agree else heads, windows
    _representative_scores_kernel[grid](
        representatives, vectors, counts, *far, scores,
        far.block_table.stride(0), vectors.shape[2], pages, scale, heads,
        COSINE=ranking.cosine, AGREE=ranking.agree, ADD=ranking.add, D=dim, BLOCK_N=block_n,
        BLOCK_D=block_d,
    )  # fmt: skip


def representative_scores_reference(
    representatives: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor, far: FarPages,
    scale: float, ranking: Ranking, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`representative_scores` in plain torch; float64 is computed in float64."""
    scores.fill_(-torch.inf)
    for s, count in enumerate(counts.tolist()):
        pages = far.pages(s)
        if not count or not len(pages):
            continue
        keys = representatives[pages].to(scores.dtype)  # [N, Hk, D]
        query = vectors[s, :, :count].to(scores.dtype)  # [Hk, R, D]
        factor = scale
        if ranking.cosine:
            keys, query, factor = _of_length_one(keys), _of_length_one(query), 1.0
        products = factor * torch.einsum("hrd,nhd->hrn", query, keys)
        if ranking.add:
            found = products.sum(1)
        else:
            best = products.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1)
            found = best.masked_fill(products.isnan().all(1), torch.nan)
        scores[s, :, : len(pages)] = found.sum(0) if ranking.agree else found


def _of_length_one(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors divided by their lengths; those of length 0 stay."""
    lengths = vectors.square().sum(-1, keepdim=True).sqrt()
    return torch.where(lengths == 0, vectors, vectors / lengths)


_TYPES = "*bf16 *{} *i32 *i32 *i32 *i32 *i32 *fp32 i32 i32 i32 fp32 i32"


def _compiled(dtype: str, dim: int, ranking: Ranking) -> Variant:
    """One way to launch."""
    block_d = triton.next_power_of_2(dim)
    return Variant(
        _representative_scores_kernel, _TYPES.format(dtype),
        {
            "COSINE": ranking.cosine, "AGREE": ranking.agree, "ADD": ranking.add, "D": dim,
            "BLOCK_N": BLOCK // block_d, "BLOCK_D": block_d,
        },
    )  # fmt: skip


COMPILED = (
    _compiled("fp32", 128, Ranking(agree=True)),
    _compiled("fp32", 128, Ranking(cosine=True, agree=True)),
    _compiled("bf16", 80, Ranking(add=False)),
    _compiled("fp16", 256, Ranking(cosine=True, add=False)),
)
"""For :mod:`kvplug.kernels.compile_check`."""
