"""Far pages of every layer for decoded tokens: the budget of all, shared by information density.

The twin on CPU is :func:`kvplug.budget.entropy.share_out` (ActQKV, Xiao et al. 2025, arXiv
2502.13542). What a prompt's windows left is known before the first layer, so one call serves all
layers of a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.carried_pages import carried_page, check_carried, physical_page
from kvplug.kernels.checks import check, check_devices, require
from kvplug.kernels.compile_check import Variant


class Densities(NamedTuple):
    """What ``S`` windows know of the layers."""

    block_table: torch.Tensor
    """``[B, max_pages]`` int32 physical pages; rows may be strided."""
    request: torch.Tensor
    """``[S]`` int32 row of the block table."""
    before: torch.Tensor
    """``[S]`` int32 logical page with what is known; a negative one where nothing is."""
    prefills: torch.Tensor
    """``[S]`` int32; a window of a prompt gets the budget in every layer."""
    begin: torch.Tensor
    """``[S]`` int32 first far page."""
    end: torch.Tensor
    """``[S]`` int32 page after the last far one."""
    means: torch.Tensor
    """``[pages, L, 2]`` float32 of each layer: mean density, and windows behind it."""

    def check(self, counts: torch.Tensor, total: torch.Tensor) -> None:
        """Refuses what the kernel would read wrongly.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device.
        """
        columns = self._asdict()
        means, table, request = (columns.pop(n) for n in ("means", "block_table", "request"))
        check_carried(table, request, len(request), **columns)
        check("means", means, ("pages", "L", 2), torch.float32)
        check("counts", counts, (means.shape[1], len(request), "Hk"), torch.int32)
        check("total", total, (1,), torch.int64)
        check_devices(means=means, block_table=table, counts=counts, total=total)


@triton.jit
def _layer_shares_kernel(  # type: ignore[no-untyped-def]
    p_table, p_request, p_before, p_prefills, p_begin, p_end, p_means, p_counts, p_total,
    table_stride, layers, heads, budget, least,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One window, layer after layer: each takes its share of what those before it left."""
    i_s, windows = tl.program_id(0), tl.num_programs(0)
    o_l, o_h = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_H)
    m_l = o_l < layers
    page = carried_page(p_table, table_stride, p_request, p_before, i_s)
    p_row = p_means + (tl.maximum(page, 0) * layers + o_l) * 2
    b_mean = tl.load(p_row, mask=m_l, other=0.0).to(tl.float64)  # [BL]
    b_seen = tl.load(p_row + 1, mask=m_l, other=1.0)
    is_shared = (page >= 0) & (tl.load(p_prefills + i_s) == 0)
    is_shared &= tl.min(b_seen, 0) > 0  # else some layer has seen nothing
    b_behind = tl.cumsum(b_mean, 0, reverse=True)  # of a layer and all behind it
    b_even = 1.0 / tl.maximum(layers - o_l, 1).to(tl.float64)
    b_share = tl.where(b_behind > 0, b_mean / tl.where(b_behind > 0, b_behind, 1.0), b_even)
    far = tl.load(p_end + i_s) - tl.load(p_begin + i_s)
    most = tl.minimum(2 * budget, far)
    left, total = budget * layers, budget * 0
    for layer in range(layers):
        share = tl.sum(tl.where(o_l == layer, b_share, 0.0), 0)
        mine = (share * left + 0.5).to(tl.int32)
        mine = tl.minimum(tl.maximum(mine, least), most)
        mine = tl.minimum(mine, left - (layers - 1 - layer) * least)
        mine = tl.where(is_shared, mine, budget)
        left -= mine
        total += mine
        p_out = p_counts + (layer * windows + i_s).to(tl.int64) * heads + o_h
        tl.store(p_out, mine + tl.zeros([BLOCK_H], tl.int32), mask=o_h < heads)
    tl.atomic_add(p_total, (total * heads).to(tl.int64))


def layer_shares(
    known: Densities, budget: int, least: int, counts: torch.Tensor, total: torch.Tensor
) -> None:
    """Shares pages among layers, for each window by itself.

    Args:
        known: Windows and what they know.
        budget: Far pages of a layer where nothing is known; all layers together get no more than
            this times their number.
        least: Pages that every layer gets at least, from 1 to the budget.
        counts: ``[L, S, Hk]`` int32, written: far pages of each layer, alike for all KV heads.
        total: ``[1]`` int64, to which the sum of all counts is added.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or a number is out of
            range.
    """
    known.check(counts, total)
    require(1 <= least <= budget, f"Of a budget of {budget} pages no layer can get {least}.")
    layers, windows, heads = counts.shape
    if windows:
        _layer_shares_kernel[(windows,)](
            *known, counts, total, known.block_table.stride(0), layers, heads, budget, least,
            BLOCK_L=triton.next_power_of_2(layers), BLOCK_H=triton.next_power_of_2(heads),
            num_warps=1,
        )  # fmt: skip


def layer_shares_reference(
    known: Densities, budget: int, least: int, counts: torch.Tensor, total: torch.Tensor
) -> None:
    """Twin of :func:`layer_shares` in plain torch and Python."""
    layers = counts.shape[0]
    for s, request in enumerate(known.request.tolist()):
        counts[:, s] = budget
        page = physical_page(known.block_table, request, int(known.before[s]))
        if page < 0 or known.prefills[s] or (known.means[page, :, 1] == 0).any():
            continue
        most = min(2 * budget, int(known.end[s] - known.begin[s]))
        densities, left = known.means[page, :, 0].double().tolist(), budget * layers
        for layer, density in enumerate(densities):
            behind = sum(densities[: layer - 1 if layer else None : -1])
            share = density / behind if behind > 0 else 1 / (layers - layer)
            mine = min(max(int(share * left + 0.5), least), most)
            mine = min(mine, left - (layers - 1 - layer) * least)
            counts[layer, s] = mine
            left -= mine
    total += counts.sum()


COMPILED = (
    Variant(
        _layer_shares_kernel,
        "*i32 *i32 *i32 *i32 *i32 *i32 *fp32 *i32 *i64 i32 i32 i32 i32 i32",
        {"BLOCK_L": 32, "BLOCK_H": 8}, num_warps=1,
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
