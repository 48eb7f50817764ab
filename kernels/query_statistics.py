"""Running mean and variance of a request's queries, carried on the pages that it fills.

The twin on CPU is :class:`kvplug.probe.query_statistics.QueryStatistics`; which pages they are is
told by :func:`kvplug.carry.carried`. Moments of windows are taken side by side and pooled in order,
``var = (var (n - 1) + sum (q - mean_w)^2 + (mean_w - mean)^2 n c / (n + c)) / (n + c - 1)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.activation import Seen
from kvplug.kernels.carried_pages import carried_page, physical_page
from kvplug.kernels.checks import check, check_devices
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.distance import BLOCK, QueryWindows, window_moments


class Carried(NamedTuple):
    """Where the windows of a step leave their statistics; where they find them is in ``Seen``."""

    prefills: torch.Tensor
    """``[S]`` int32, 0 for a decoded token, which only hands on; else a part of the prompt."""
    here: torch.Tensor
    """``[S]`` int32 logical page to write to; a negative one where nothing is."""
    also: torch.Tensor
    """``[S]`` int32 another one; may be the same."""


@triton.jit
def _moments_kernel(  # type: ignore[no-untyped-def]
    p_queries, p_start, p_count, p_prefills, p_here, p_moments, stride_token, stride_head,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of one head's queries of one window."""
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    count = tl.load(p_count + i_s)
    if (tl.load(p_prefills + i_s) == 0) | (tl.load(p_here + i_s) < 0) | (count <= 0):
        return
    start = tl.load(p_start + i_s).to(tl.int64)
    p_head = p_queries + start * stride_token + i_h.to(tl.int64) * stride_head
    b_mean, b_squares = window_moments(p_head, stride_token, count, D, BLOCK_T, BLOCK_D)
    o_d = tl.arange(0, BLOCK_D)
    p_out = p_moments + (i_s * tl.num_programs(1) + i_h).to(tl.int64) * (2 * D) + o_d
    tl.store(p_out, b_mean, mask=o_d < D)
    tl.store(p_out + D, b_squares, mask=o_d < D)


@triton.jit
def _pool_kernel(  # type: ignore[no-untyped-def]
    p_count, p_prefills, p_table, p_request, p_before, p_here, p_also, p_moments,
    p_means, p_variances, p_seen, table_stride, windows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head, window after window: a request may begin with pages that another fills."""
    i_h = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    for i_s in range(windows):
        here = carried_page(p_table, table_stride, p_request, p_here, i_s)
        if here >= 0:
            before = carried_page(p_table, table_stride, p_request, p_before, i_s)
            i_row = tl.maximum(before, 0) * heads + i_h
            seen = tl.where(before >= 0, tl.load(p_seen + i_row), 0.0)
            b_mean = tl.load(p_means + i_row * D + o_d, mask=m_d, other=0.0)  # [BD]
            b_variance = tl.load(p_variances + i_row * D + o_d, mask=m_d, other=0.0)
            if tl.load(p_prefills + i_s):
                p_window = p_moments + (i_s * heads + i_h).to(tl.int64) * (2 * D) + o_d
                b_center = tl.load(p_window, mask=m_d, other=0.0)
                b_spread = tl.load(p_window + D, mask=m_d, other=0.0)
                if tl.abs(tl.sum(b_spread, 0)) < float("inf"):  # neither NaN nor infinite
                    count = tl.load(p_count + i_s).to(tl.float32)
                    total = seen + count
                    b_delta = b_center - tl.where(seen > 0, b_mean, b_center)
                    b_squares = tl.where(seen > 0, b_variance * (seen - 1), 0.0) + b_spread
                    b_squares += b_delta * b_delta * (seen * count / total)
                    b_variance = b_squares / tl.maximum(total - 1, 1.0)
                    b_mean = tl.where(seen > 0, b_mean, b_center) + b_delta * (count / total)
                    seen = total
            for i_page in tl.static_range(2):
                page = here
                if i_page == 1:
                    page = carried_page(p_table, table_stride, p_request, p_also, i_s)
                i_row = page * heads + i_h
                tl.store(p_seen + i_row, seen)
                tl.store(p_means + i_row * D + o_d, b_mean, mask=m_d)
                tl.store(p_variances + i_row * D + o_d, b_variance, mask=m_d)
        # The next window reads what this one wrote, with other threads.
        tl.debug_barrier()


def query_statistics(
    windows: QueryWindows, seen: Seen, carried: Carried, moments: torch.Tensor
) -> None:
    """Goes on from what each window of a prompt finds, and writes what it leaves.

    A head with a NaN or an infinity in a window sits that window out.

    Args:
        windows: The queries.
        seen: Statistics by page; ``before`` is where each window finds those before it.
        carried: Where it leaves its own. Windows are taken in order, so that a later one may find
            what an earlier one leaves.
        moments: ``[S, H, 2, D]`` float32 scratch.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    num, heads, dim = windows.check_queries()
    check("moments", moments, (num, heads, 2, dim), torch.float32)
    seen.check(num, heads, dim)
    for name, column in carried._asdict().items():
        check(f"carried.{name}", column, (num,), torch.int32)
    check_devices(moments=moments, queries=windows.queries, **seen._asdict(), **carried._asdict())
    if not num:
        return
    block_d = triton.next_power_of_2(dim)
    _moments_kernel[(num, heads)](
        *windows, carried.prefills, carried.here, moments, *windows.queries.stride()[:2],
        D=dim, BLOCK_T=BLOCK // block_d, BLOCK_D=block_d,
    )  # fmt: skip
    _pool_kernel[(heads,)](
        windows.num_tokens, carried.prefills, seen.block_table, seen.request, seen.before,
        carried.here, carried.also, moments, seen.means, seen.variances, seen.counts,
        seen.block_table.stride(0), num, heads, D=dim, BLOCK_D=block_d, num_warps=1,
    )  # fmt: skip


def query_statistics_reference(
    windows: QueryWindows, seen: Seen, carried: Carried, moments: torch.Tensor
) -> None:
    """Twin of :func:`query_statistics` in plain torch; float64 means are computed in float64."""
    states = seen.means, seen.variances, seen.counts
    for s, request in enumerate(seen.request.tolist()):
        before, here, also = (
            physical_page(seen.block_table, request, int(column[s]))
            for column in (seen.before, carried.here, carried.also)
        )
        if here < 0:
            continue
        mean, variance, count = (
            torch.zeros_like(x[0]) if before < 0 else x[before].clone() for x in states
        )
        if carried.prefills[s]:
            query = windows.of(s).to(mean.dtype)
            center, new = query.mean(0), len(query)
            spread = ((query - center) ** 2).sum(0)
            total = (count + new)[:, None]
            old = count[:, None]
            delta = torch.where(old > 0, center - mean, 0)
            squares = variance * (old - 1).clamp(min=0) + spread + delta**2 * old * new / total
            takes_part = spread.sum(-1).isfinite()
            pooled = torch.where(old > 0, mean + delta * new / total, center)
            mean = torch.where(takes_part[:, None], pooled, mean)
            variance = torch.where(
                takes_part[:, None], squares / (total - 1).clamp(min=1), variance
            )
            count = torch.where(takes_part, count + new, count)
        for page in (here, also):
            for state, value in zip(states, (mean, variance, count), strict=True):
                state[page] = value


COMPILED = (
    Variant(
        _moments_kernel, "*bf16 *i32 *i32 *i32 *i32 *fp32 i32 i32",
        {"D": 128, "BLOCK_T": BLOCK // 128, "BLOCK_D": 128},
    ),
    Variant(
        _pool_kernel,
        "*i32 *i32 *i32 *i32 *i32 *i32 *i32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32",
        {"D": 80, "BLOCK_D": 128}, num_warps=1,
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
