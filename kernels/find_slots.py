"""Looks up the slots of what a turn's rows list, and claims what the pool lacks.

The twin on CPU is ``find_rows`` of :mod:`kvplug.offload.place`. A slot that holds a listed entry is
stamped, so that it is not taken in this turn. An entry that no slot holds is claimed by
its first place in the rows: places are lowered to it one by one, which gives the same claims in
whatever order they come.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvplug.kernels.compile_check import Variant
from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.slot_maps import CLAIMED, HITS, SlotMaps, listed_entries

BLOCK = 128
"""Places of a row that a program looks up. Not measured: no GPU was at hand."""


@triton.jit(do_not_specialize=["p_table", "p_lengths"])
def _find_slots_kernel(  # type: ignore[no-untyped-def]
    p_table, p_lengths, p_slot_of, p_used, p_clock, p_lacking, p_counts, width, page, heads,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N places of one row."""
    i_row = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_entry, m_n = listed_entries(p_table, p_lengths, i_row, o_n, width, page, heads)
    b_slot = tl.load(p_slot_of + b_entry, mask=m_n, other=0)
    now = tl.load(p_clock) + 1
    m_held = m_n & (b_slot >= 0)
    p_stamps = p_used + tl.maximum(b_slot, 0)
    b_before = tl.atomic_max(p_stamps, tl.zeros([BLOCK_N], tl.int64) + now, m_held, "relaxed")
    first_uses = tl.sum((m_held & (b_before < now)).to(tl.int64), 0)
    if first_uses > 0:
        tl.atomic_add(p_counts + HITS, first_uses, sem="relaxed")
    m_lacking = m_n & (b_slot < 0)
    lacking = tl.sum(m_lacking.to(tl.int32), 0)
    if lacking > 0:
        b_place = i_row * width + o_n + CLAIMED
        tl.atomic_min(p_slot_of + b_entry, b_place, m_lacking, "relaxed")
        tl.atomic_add(p_lacking, lacking, sem="relaxed")


def find_slots(rows: PageRows, page: int, maps: SlotMaps) -> None:
    """Stamps the slots of what the rows list; claims listed entries without one.

    Args:
        rows: ``n * Hk`` of them, of physical pages.
        page: P.
        maps: Of the pool; stamps, claims and counts are written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or the page size is not
            supported.
    """
    maps.check_rows(rows, page)
    num, width = rows.table.shape
    if not num or not width:
        return
    _find_slots_kernel[(num, triton.cdiv(width, BLOCK))](
        *rows, maps.slot_of, maps.used, maps.clock, maps.lacking, maps.counts,
        width, page, maps.slot_of.shape[1], BLOCK_N=BLOCK,
    )  # fmt: skip


def find_slots_reference(rows: PageRows, page: int, maps: SlotMaps) -> None:
    """Twin of :func:`find_slots` in plain torch."""
    now = int(maps.clock) + 1
    for place, number, head in maps.entries_of(rows, page):
        slot = int(maps.slot_of[number, head])
        if slot < 0:
            maps.slot_of[number, head] = min(slot, CLAIMED.value + place)
            maps.lacking.add_(1)
        elif maps.used[slot] < now:
            maps.used[slot] = now
            maps.counts[HITS.value] += 1


COMPILED = (
    Variant(
        _find_slots_kernel, "*i32 *i32 *i32 *i64 *i64 *i32 *i64 i32 i32 i32", {"BLOCK_N": BLOCK}
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
