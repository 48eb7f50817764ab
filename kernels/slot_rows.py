"""Rows of the page table with slots of the hot pool for pages.

Attention reads the pool as a cache whose pages have a single head: row ``s * Hk + h`` names slots
that hold pages of head ``h``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.slot_maps import SlotMaps, listed_entries

BLOCK = 128
"""Places of a row that a program writes. Not measured: no GPU was at hand."""


@triton.jit(do_not_specialize=["p_table", "p_lengths"])
def _slot_rows_kernel(  # type: ignore[no-untyped-def]
    p_table, p_lengths, p_slot_of, p_slots, width, page, heads, BLOCK_N: tl.constexpr
):
    """BLOCK_N places of one row."""
    i_row = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_entry, m_n = listed_entries(p_table, p_lengths, i_row, o_n, width, page, heads)
    b_slot = tl.load(p_slot_of + b_entry, mask=m_n, other=0)
    tl.store(p_slots + i_row.to(tl.int64) * width + o_n, b_slot, mask=o_n < width)


def slot_rows(rows: PageRows, page: int, maps: SlotMaps, slots: torch.Tensor) -> None:
    """Writes the slots of a turn's rows, all of which have one.

    Args:
        rows: ``n * Hk`` of them, of physical pages.
        page: P.
        maps: Of the pool.
        slots: ``[n * Hk, W]`` int32, written; behind a row's pages 0, for a slot must be there.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or the page size is not
            supported.
    """
    maps.check_rows(rows, page)
    check("slots", slots, tuple(rows.table.shape), torch.int32)
    check_devices(slot_of=maps.slot_of, slots=slots)
    num, width = rows.table.shape
    if not num or not width:
        return
    _slot_rows_kernel[(num, triton.cdiv(width, BLOCK))](
        *rows, maps.slot_of, slots, width, page, maps.slot_of.shape[1], BLOCK_N=BLOCK
    )


def slot_rows_reference(rows: PageRows, page: int, maps: SlotMaps, slots: torch.Tensor) -> None:
    """Twin of :func:`slot_rows` in plain torch."""
    slots.zero_()
    flat = slots.view(-1)
    for place, number, head in maps.entries_of(rows, page):
        flat[place] = maps.slot_of[number, head]


COMPILED = (Variant(_slot_rows_kernel, "*i32 *i32 *i32 *i32 i32 i32 i32", {"BLOCK_N": BLOCK}),)
"""For :mod:`kvplug.kernels.compile_check`."""
