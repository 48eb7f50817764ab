"""How widely a window's page scores spread: the entropy of their softmax over its largest value.

The twin on CPU is :mod:`kvplug.budget.density` (ActQKV's information density, Xiao et al. 2025,
arXiv 2502.13542). Scores are standardised over the window's far pages and divided by a temperature:
``x = (s - max s) / (std(s) * temperature)``, ``H = log(sum e^x) - sum(e^x x) / sum(e^x)``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, require
from kvplug.kernels.compile_check import Variant

BLOCK = 1024
"""Scores that a program looks at in a step. Not measured: no GPU was at hand."""


@triton.jit
def _scores(p_row, n, limit, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Block of scores at ``n``, and which of them are numbers of pages that there are."""
    o_n = n + tl.arange(0, BLOCK_N)
    b_scores = tl.load(p_row + o_n, mask=o_n < limit, other=float("nan"))  # [BN]
    return b_scores, tl.abs(b_scores) < float("inf")


@triton.jit
def _page_density_kernel(  # type: ignore[no-untyped-def]
    p_scores, p_begin, p_end, p_wanted, p_found, num_pages, temperature, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row. Scores are taken from their largest, so that those that are alike are just 0."""
    i_s = tl.program_id(0)
    if tl.load(p_wanted + i_s) == 0:
        return
    i_row = (i_s * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    limit = tl.load(p_end + i_s) - tl.load(p_begin + i_s)
    p_row = p_scores + i_row * num_pages
    b_best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    b_count = tl.zeros([BLOCK_N], tl.int32)
    for n in range(0, limit, BLOCK_N):
        b_scores, m_n = _scores(p_row, n, limit, BLOCK_N)
        b_best = tl.maximum(b_best, tl.where(m_n, b_scores, float("-inf")))
        b_count += m_n.to(tl.int32)
    best, count = tl.max(b_best, 0), tl.sum(b_count, 0)
    if count < 2:
        tl.store(p_found + i_row, float("nan"))
        return
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for n in range(0, limit, BLOCK_N):
        b_scores, m_n = _scores(p_row, n, limit, BLOCK_N)
        b_sum += tl.where(m_n, b_scores - best, 0.0)
    mean = tl.sum(b_sum, 0) / count
    b_squares = tl.zeros([BLOCK_N], tl.float32)
    for n in range(0, limit, BLOCK_N):
        b_scores, m_n = _scores(p_row, n, limit, BLOCK_N)
        b_away = tl.where(m_n, b_scores - best - mean, 0.0)
        b_squares += b_away * b_away
    deviation = tl.sqrt(tl.sum(b_squares, 0) / count)
    if deviation <= 1e-6 * tl.abs(best + mean) + 1e-30:  # rounding at most: all pages are alike
        tl.store(p_found + i_row, 1.0)
        return
    b_total = tl.zeros([BLOCK_N], tl.float32)
    b_weighted = tl.zeros([BLOCK_N], tl.float32)
    for n in range(0, limit, BLOCK_N):
        b_scores, m_n = _scores(p_row, n, limit, BLOCK_N)
        b_x = tl.where(m_n, (b_scores - best) / (deviation * temperature), 0.0)
        b_e = tl.where(m_n, tl.exp(b_x), 0.0)
        b_total += b_e
        b_weighted += b_e * b_x
    total = tl.sum(b_total, 0)
    entropy = tl.log(total) - tl.sum(b_weighted, 0) / total
    tl.store(p_found + i_row, entropy / tl.log(count.to(tl.float32)))


def page_density(
    scores: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, wanted: torch.Tensor,
    temperature: float, found: torch.Tensor,
) -> None:  # fmt: skip
    """Density of each window's and KV head's scores, from 0 to 1.

    NaN and infinite scores are left out; where fewer than two numbers are left, it is NaN.

    Args:
        scores: ``[S, Hk, N]`` float32 of the far pages in order; what is behind them is not read.
        begin: ``[S]`` int32 first far page.
        end: ``[S]`` int32 page after the last far one.
        wanted: ``[S]`` int32, 0 where a window's row is left alone.
        temperature: Of the softmax over standardised scores, more than 0.
        found: ``[S, Hk]`` float32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or the temperature is
            not positive.
    """
    check("scores", scores, ("S", "Hk", "N"), torch.float32)
    windows, heads, pages = scores.shape
    columns = {"begin": begin, "end": end, "wanted": wanted}
    for name, column in columns.items():
        check(name, column, (windows,), torch.int32)
    check("found", found, (windows, heads), torch.float32)
    check_devices(scores=scores, found=found, **columns)
    require(temperature > 0, f"Temperature must be positive, not {temperature}.")
    if windows:
        _page_density_kernel[(windows, heads)](
            scores, begin, end, wanted, found, pages, float(temperature), BLOCK_N=BLOCK
        )


def page_density_reference(
    scores: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, wanted: torch.Tensor,
    temperature: float, found: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`page_density` in plain torch, in the dtype of ``found``."""
    for s, limit in enumerate((end - begin).tolist()):
        for head in range(scores.shape[1] if wanted[s] else 0):
            mine = scores[s, head, :limit]
            x = mine[mine.isfinite()].to(found.dtype)
            if len(x) < 2:
                found[s, head] = torch.nan
                continue
            away = x - x.max()
            deviation = away.std(unbiased=False)
            if deviation <= 1e-6 * x.mean().abs() + 1e-30:
                found[s, head] = 1
                continue
            shares = (away / (deviation * temperature)).softmax(0)
            entropy = -torch.special.xlogy(shares, shares).sum()
            found[s, head] = entropy / torch.tensor(float(len(x))).to(found).log()


COMPILED = (
    Variant(
        _page_density_kernel, "*fp32 *i32 *i32 *i32 *fp32 i32 fp32", {"BLOCK_N": BLOCK}
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
