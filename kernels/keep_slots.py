"""Stamps slots of what later turns of a step list, so that they are the last to give way.

The twin on CPU is ``find_rows`` of :mod:`kvplug.offload.place`, for windows that do not fit at
once. Without it what is used longest ago is what the next turn needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvplug.kernels.compile_check import Variant
from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.slot_maps import SlotMaps, listed_entries

BLOCK = 128
"""Places of a row that a program looks up. Not measured: no GPU was at hand."""


@triton.jit(do_not_specialize=["p_table", "p_lengths"])
def _keep_slots_kernel(  # type: ignore[no-untyped-def]
    p_table, p_lengths, p_slot_of, p_used, p_clock, width, page, heads, BLOCK_N: tl.constexpr
):
    """BLOCK_N places of one row; whoever stamps a slot stamps the same."""
    i_row = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_entry, m_n = listed_entries(p_table, p_lengths, i_row, o_n, width, page, heads)
    b_slot = tl.load(p_slot_of + b_entry, mask=m_n, other=-1)
    b_stamp = tl.zeros([BLOCK_N], tl.int64) + tl.load(p_clock)
    tl.store(p_used + tl.maximum(b_slot, 0), b_stamp, mask=m_n & (b_slot >= 0))


def keep_slots(rows: PageRows, page: int, maps: SlotMaps) -> None:
    """Stamps what the pool holds of rows that follow; before the turn's own rows are looked up.

    Args:
        rows: ``n * Hk`` of them, of physical pages, none of which this turn places.
        page: P.
        maps: Of the pool; stamps are written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or the page size is not
            supported.
    """
    maps.check_rows(rows, page)
    num, width = rows.table.shape
    if not num or not width:
        return
    _keep_slots_kernel[(num, triton.cdiv(width, BLOCK))](
        *rows, maps.slot_of, maps.used, maps.clock, width, page, maps.slot_of.shape[1],
        BLOCK_N=BLOCK,
    )  # fmt: skip


def keep_slots_reference(rows: PageRows, page: int, maps: SlotMaps) -> None:
    """Twin of :func:`keep_slots` in plain torch."""
    for _, number, head in maps.entries_of(rows, page):
        slot = int(maps.slot_of[number, head])
        if slot >= 0:
            maps.used[slot] = maps.clock[0]


COMPILED = (
    Variant(_keep_slots_kernel, "*i32 *i32 *i32 *i64 *i64 i32 i32 i32", {"BLOCK_N": BLOCK}),
)
"""For :mod:`kvplug.kernels.compile_check`."""
