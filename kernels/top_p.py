"""The fewest far pages whose estimated attention is a share ``p`` of all far pages'.

The twin on CPU is :class:`kvplug.budget.top_p.TopPBudget` (Twilight, Lin et al. 2025, arXiv
2502.02770). A page's mass is ``exp((score - max score) / temperature)``. The least mass that counts
is found by bisection of its bits, which order as the numbers do: 30 passes over a row's masses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, require
from kvplug.kernels.compile_check import Variant

BLOCK = 1024
"""Masses that a program looks at in a step. Not measured: no GPU was at hand."""


@triton.jit
def _at_least(p_masses, limit, least, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum, in float64, and number of the masses whose bits are at least ``least``."""
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_count = tl.zeros([BLOCK_N], tl.int32)
    for n in range(0, limit, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_mass = tl.load(p_masses + o_n, mask=o_n < limit, other=-1.0)  # [BN]
        m_n = b_mass.to(tl.int32, bitcast=True) >= least
        b_sum += tl.where(m_n, b_mass, 0.0)
        b_count += m_n.to(tl.int32)
    return tl.sum(b_sum.to(tl.float64), 0), tl.sum(b_count, 0)


@triton.jit
def _top_p_kernel(  # type: ignore[no-untyped-def]
    p_scores, p_begin, p_end, p_masses, p_counts, p_total, num_pages, budget, sharpness, share,
    rest, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row; the share and the rest of it are two halves of a float64."""
    i_s = tl.program_id(0)
    i_row = (i_s * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    limit = tl.load(p_end + i_s) - tl.load(p_begin + i_s)
    p_row, p_mine = p_scores + i_row * num_pages, p_masses + i_row * num_pages
    b_best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for n in range(0, limit, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_scores = tl.load(p_row + o_n, mask=o_n < limit, other=float("-inf"))  # [BN]
        b_known = tl.where(tl.abs(b_scores) < float("inf"), b_scores, float("-inf"))
        b_best = tl.maximum(b_best, b_known)
    best = tl.max(b_best, 0)
    for n in range(0, limit, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_scores = tl.load(p_row + o_n, mask=o_n < limit, other=float("-inf"))
        m_n = tl.abs(b_scores) < float("inf")
        b_mass = tl.exp(tl.where(m_n, b_scores - best, 0.0) * sharpness)
        tl.store(p_mine + o_n, tl.where(m_n, b_mass, 0.0), mask=o_n < limit)
    # Masses are read back by other threads than wrote them.
    tl.debug_barrier()
    total, count = _at_least(p_mine, limit, limit * 0, BLOCK_N)
    chosen = limit * 0 + budget
    if total > 0:
        wanted = total * share + total * rest
        # Those from 0 on are enough; none is more than 1.
        least, above = limit * 0, limit * 0 + 0x3F800001
        for _ in range(30):
            middle = (least + above) // 2
            held, count = _at_least(p_mine, limit, middle, BLOCK_N)
            least = tl.where(held >= wanted, middle, least)
            above = tl.where(held >= wanted, above, middle)
        held, count = _at_least(p_mine, limit, least + 1, BLOCK_N)
        each = tl.full([1], 0, tl.int32) + least
        mass = tl.max(each.to(tl.float32, bitcast=True).to(tl.float64), 0)
        # Those that are just as heavy as the least are alike.
        more = tl.where(mass > 0, (wanted - held) / tl.where(mass > 0, mass, 1.0), 0.0)
        whole = more.to(tl.int32)
        whole += tl.where(whole < more, 1, 0)
        chosen = tl.minimum(tl.maximum(count + whole, 1), budget)
    tl.store(p_counts + i_row, chosen)
    tl.atomic_add(p_total, chosen.to(tl.int64))


def top_p(
    scores: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, budget: int, share: float,
    temperature: float, masses: torch.Tensor, counts: torch.Tensor, total: torch.Tensor,
) -> None:  # fmt: skip
    """Counts pages of each window and KV head; a row without numbers gets the budget.

    Args:
        scores: ``[S, Hk, N]`` float32 logits of the far pages in order; what is behind them is not
            read. NaN and infinite ones weigh nothing.
        begin: ``[S]`` int32 first far page.
        end: ``[S]`` int32 page after the last far one.
        budget: Most pages of a row, at least 1.
        share: p, more than 0, less than 1.
        temperature: Of the softmax, more than 0.
        masses: ``[S, Hk, N]`` float32 scratch.
        counts: ``[S, Hk]`` int32, written: 1 to ``budget``.
        total: ``[1]`` int64, to which the sum of all counts is added.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or a number is out of
            range.
    """
    check("scores", scores, ("S", "Hk", "N"), torch.float32)
    windows, heads, pages = scores.shape
    columns = {"begin": begin, "end": end}
    for name, column in columns.items():
        check(name, column, (windows,), torch.int32)
    check("masses", masses, (windows, heads, pages), torch.float32)
    check("counts", counts, (windows, heads), torch.int32)
    check("total", total, (1,), torch.int64)
    check_devices(scores=scores, masses=masses, counts=counts, total=total, **columns)
    require(budget >= 1, f"A row needs at least 1 page, not {budget}.")
    require(0 < share < 1, f"A share must be between 0 and 1, not {share}.")
    require(temperature > 0, f"Temperature must be positive, not {temperature}.")
    half = float(torch.tensor(share, dtype=torch.float32))
    if windows:
        _top_p_kernel[(windows, heads)](
            scores, begin, end, masses, counts, total, pages, budget, 1 / temperature, half,
            share - half, BLOCK_N=BLOCK,
        )  # fmt: skip


def top_p_reference(
    scores: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, budget: int, share: float,
    temperature: float, masses: torch.Tensor, counts: torch.Tensor, total: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`top_p` in plain torch, in float64; it needs no scratch."""
    for s, limit in enumerate((end - begin).tolist()):
        for head in range(scores.shape[1]):
            mine = scores[s, head, :limit]
            mine = mine[mine.isfinite()].double() / temperature
            counts[s, head] = budget
            if len(mine):
                held = mine.softmax(0).sort(descending=True).values.cumsum(0)
                fewest = 1 + int((held < share).sum())
                counts[s, head] = min(fewest, budget)
    total += counts.sum()


COMPILED = (
    Variant(
        _top_p_kernel, "*fp32 *i32 *i32 *fp32 *i32 *i64 i32 i32 fp32 fp32 fp32", {"BLOCK_N": BLOCK}
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
