"""Every layer's mean density over a prompt's windows, carried on the pages that the prompt fills.

The twin on CPU is :class:`kvplug.budget.density.LayerDensity`; which pages they are is told by
:func:`kvplug.carry.carried`. Windows are taken one after the other, in the order of the step, for
one may find what another of the same step leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.carried_pages import carried_page, check_carried, physical_page
from kvplug.kernels.checks import check, check_devices, require
from kvplug.kernels.compile_check import Variant


class CarriedDensity(NamedTuple):
    """What is carried, and the ``n`` windows that carry it."""

    block_table: torch.Tensor
    """``[B, max_pages]`` int32 physical pages; rows may be strided."""
    request: torch.Tensor
    """``[n]`` int32 row of the block table."""
    before: torch.Tensor
    """``[n]`` int32 logical page to go on from; a negative one at the start of a request."""
    here: torch.Tensor
    """``[n]`` int32 logical page to write to; a negative one where nothing is."""
    also: torch.Tensor
    """``[n]`` int32 another one; may be the same."""
    prefills: torch.Tensor
    """``[n]`` int32, 0 for a decoded token; else a part of the prompt."""
    means: torch.Tensor
    """``[pages, L, 2]`` float32 of each layer: mean density, and windows behind it."""

    def check(self, rank: int) -> None:
        """Refuses what kernels would read wrongly.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device, or there is no layer
                ``rank``.
        """
        columns = self._asdict()
        means, table, request = (columns.pop(n) for n in ("means", "block_table", "request"))
        check_carried(table, request, len(request), **columns)
        check("means", means, ("pages", "L", 2), torch.float32)
        check_devices(means=means, block_table=table)
        require(0 <= rank < means.shape[1], f"There are {means.shape[1]} layers, not {rank}.")


@triton.jit
def _hand_on_kernel(  # type: ignore[no-untyped-def]
    p_table, p_request, p_before, p_here, p_also, p_prefills, p_means, table_stride, windows, rank,
    layers, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Prompt windows hand on their layer's numbers; decoded tokens, by the first, all layers'."""
    o_l = tl.arange(0, BLOCK_L)
    for i_s in range(windows):
        here = carried_page(p_table, table_stride, p_request, p_here, i_s)
        before = carried_page(p_table, table_stride, p_request, p_before, i_s)
        is_prompt = tl.load(p_prefills + i_s) != 0
        first = tl.where(is_prompt, 2 * rank, 0)
        of_all = tl.where((rank == 0) & (before >= 0), 2 * layers, 0)
        last = tl.where(here >= 0, tl.where(is_prompt, 2 * rank + 2, of_all), 0)
        m_l = (o_l >= first) & (o_l < last)
        p_from = p_means + tl.maximum(before, 0) * layers * 2 + o_l
        b_known = tl.where(before >= 0, tl.load(p_from, mask=m_l, other=0.0), 0.0)  # [BL]
        tl.store(p_means + here * layers * 2 + o_l, b_known, mask=m_l)
        if is_prompt:
            also = carried_page(p_table, table_stride, p_request, p_also, i_s)
            tl.store(p_means + also * layers * 2 + o_l, b_known, mask=m_l)
        # The next window reads what this one wrote, with other threads.
        tl.debug_barrier()


def hand_on_densities(carried: CarriedDensity, rank: int) -> None:
    """Copies what each window goes on from to where it leaves it.

    Args:
        carried: Windows and their means.
        rank: Layer, from 0. Only the first one does anything for decoded tokens.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    carried.check(rank)
    windows, layers = len(carried.request), carried.means.shape[1]
    if windows:
        _hand_on_kernel[(1,)](
            *carried, carried.block_table.stride(0), windows, rank, layers,
            BLOCK_L=triton.next_power_of_2(2 * layers), num_warps=1,
        )  # fmt: skip


@triton.jit
def _learn_kernel(  # type: ignore[no-untyped-def]
    p_table, p_request, p_before, p_here, p_also, p_prefills, p_means, p_row, p_found, table_stride,
    windows, rank, layers, heads, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Adds each scored prompt window's density, averaged over heads, to the layer's mean."""
    o_h, o_2 = tl.arange(0, BLOCK_H), tl.arange(0, 2)
    for i_s in range(windows):
        row = tl.load(p_row + i_s)
        if (row >= 0) & (tl.load(p_prefills + i_s) != 0):
            p_row_found = p_found + row.to(tl.int64) * heads + o_h
            b_found = tl.load(p_row_found, mask=o_h < heads, other=float("nan"))  # [BH]
            m_known = b_found == b_found
            known = tl.sum(m_known.to(tl.int32), 0)
            total = tl.sum(tl.where(m_known, b_found, 0.0).to(tl.float64), 0)
            before = carried_page(p_table, table_stride, p_request, p_before, i_s)
            p_from = p_means + (tl.maximum(before, 0) * layers + rank) * 2
            mean = tl.where(before >= 0, tl.load(p_from), 0.0)
            count = tl.where(before >= 0, tl.load(p_from + 1), 0.0)
            if known > 0:
                count += 1
                mean += ((total / known).to(tl.float32) - mean) / count
            b_new = tl.where(o_2 == 0, mean, count)
            for i_page in tl.static_range(2):
                page = carried_page(p_table, table_stride, p_request, p_here, i_s)
                if i_page == 1:
                    page = carried_page(p_table, table_stride, p_request, p_also, i_s)
                tl.store(p_means + (page * layers + rank) * 2 + o_2, b_new)
        tl.debug_barrier()


def learn_densities(
    carried: CarriedDensity, rank: int, rows: torch.Tensor, found: torch.Tensor
) -> None:
    """Takes in what one layer found of the step's prompt windows, after :func:`hand_on_densities`.

    Args:
        carried: Windows and their means.
        rank: Layer, from 0.
        rows: ``[n]`` int32 row of ``found`` of each window; negative where it was not scored.
        found: ``[S, Hk]`` float32 densities; NaN ones do not count.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    carried.check(rank)
    windows, layers = len(carried.request), carried.means.shape[1]
    check("rows", rows, (windows,), torch.int32)
    check("found", found, ("S", "Hk"), torch.float32)
    check_devices(rows=rows, found=found, means=carried.means)
    heads = found.shape[1]
    if windows:
        _learn_kernel[(1,)](
            *carried, rows, found, carried.block_table.stride(0), windows, rank, layers, heads,
            BLOCK_H=triton.next_power_of_2(heads), num_warps=1,
        )  # fmt: skip


def hand_on_densities_reference(carried: CarriedDensity, rank: int) -> None:
    """Twin of :func:`hand_on_densities` in plain torch."""
    for s, before, here, also in _places(carried):
        if here < 0:
            continue
        if carried.prefills[s]:
            known = carried.means[before, rank] if before >= 0 else carried.means.new_zeros(2)
            carried.means[here, rank] = carried.means[also, rank] = known.clone()
        elif rank == 0 and before >= 0:
            carried.means[here] = carried.means[before]


def learn_densities_reference(
    carried: CarriedDensity, rank: int, rows: torch.Tensor, found: torch.Tensor
) -> None:
    """Twin of :func:`learn_densities` in plain torch."""
    for s, before, here, also in _places(carried):
        row = int(rows[s])
        if row < 0 or not carried.prefills[s]:
            continue
        known = carried.means[before, rank] if before >= 0 else carried.means.new_zeros(2)
        mean, count = known.clone()
        mine = found[row][~found[row].isnan()]
        if len(mine):
            count += 1
            mean += (mine.double().mean().to(mean.dtype) - mean) / count
        for page in (here, also):
            carried.means[page, rank] = torch.stack([mean, count])


def _places(carried: CarriedDensity) -> Iterator[tuple[int, int, int, int]]:
    """Number of each window, and its physical pages."""
    columns = carried.before, carried.here, carried.also
    for s, request in enumerate(carried.request.tolist()):
        before, here, also = (
            physical_page(carried.block_table, request, int(column[s])) for column in columns
        )
        yield s, before, here, also


_WINDOWS = "*i32 *i32 *i32 *i32 *i32 *i32 *fp32"
COMPILED = (
    Variant(_hand_on_kernel, f"{_WINDOWS} i32 i32 i32 i32", {"BLOCK_L": 64}, num_warps=1),
    Variant(
        _learn_kernel, f"{_WINDOWS} *i32 *fp32 i32 i32 i32 i32 i32", {"BLOCK_H": 8}, num_warps=1
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
