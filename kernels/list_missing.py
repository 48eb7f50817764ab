"""Lists what a turn's rows list and the pool lacks, each entry once, in the order of the rows.

:mod:`.find_slots` has claimed each by its first place, so an entry is listed where the claim is the
place itself. One program goes through all places, for the order is by places; where nothing is
lacking, as in most steps that decode, it ends at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.slot_maps import CLAIMED, MISSES, SlotMaps, listed_entries

BLOCK = 2048
"""Places that the program looks at in a step. Not measured: no GPU was at hand."""


@triton.jit(do_not_specialize=["p_table", "p_lengths", "num_rows", "most"])
def _list_missing_kernel(  # type: ignore[no-untyped-def]
    p_table, p_lengths, p_slot_of, p_lacking, p_counts, p_entries, p_missing, num_rows, width,
    page, heads, most, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All places."""
    filled = tl.load(p_lacking) * 0
    if tl.load(p_lacking) > 0:
        for place in range(0, num_rows * width, BLOCK_N):
            o_place = place + tl.arange(0, BLOCK_N)
            m_place = o_place < num_rows * width
            b_row = tl.where(m_place, o_place // width, 0)
            o_n = tl.where(m_place, o_place % width, width)
            b_entry, m_n = listed_entries(p_table, p_lengths, b_row, o_n, width, page, heads)
            b_claim = tl.load(p_slot_of + b_entry, mask=m_n, other=0)
            m_first = m_n & (b_claim == o_place + CLAIMED)
            b_first = m_first.to(tl.int32)
            o_out = filled + tl.cumsum(b_first, 0) - 1
            m_first &= o_out < most
            p_out = p_entries + o_out * 3
            tl.store(p_out, (b_entry // heads).to(tl.int32), mask=m_first)
            tl.store(p_out + 1, (b_entry % heads).to(tl.int32), mask=m_first)
            filled += tl.sum(b_first, 0)
        tl.store(p_lacking, 0)
        tl.store(p_counts + MISSES, tl.load(p_counts + MISSES) + filled)
    tl.store(p_missing, filled)


def list_missing(
    rows: PageRows, page: int, maps: SlotMaps, entries: torch.Tensor, missing: torch.Tensor
) -> None:
    """Lists claimed entries.

    Args:
        rows: ``n * Hk`` of them, which :func:`.find_slots.find_slots` has seen in this turn.
        page: P.
        maps: Of the pool; counts are written, and nothing is lacking any more.
        entries: ``[m, 3]`` int32, page and head of the listed written; at least as many as the rows
            list different ones.
        missing: ``[1]`` int32, written: how many are listed.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or the page size is not
            supported.
    """
    maps.check_rows(rows, page)
    check("entries", entries, ("m", 3), torch.int32)
    check("missing", missing, (1,), torch.int32)
    check_devices(slot_of=maps.slot_of, entries=entries, missing=missing)
    _list_missing_kernel[(1,)](
        *rows, maps.slot_of, maps.lacking, maps.counts, entries, missing, *rows.table.shape, page,
        maps.slot_of.shape[1], len(entries), BLOCK_N=BLOCK, num_warps=8,
    )  # fmt: skip


def list_missing_reference(
    rows: PageRows, page: int, maps: SlotMaps, entries: torch.Tensor, missing: torch.Tensor
) -> None:
    """Twin of :func:`list_missing` in plain torch."""
    claimed = [
        (number, head)
        for place, number, head in maps.entries_of(rows, page)
        if int(maps.slot_of[number, head]) == CLAIMED.value + place
    ]
    for i, (number, head) in enumerate(claimed):
        entries[i, 0], entries[i, 1] = number, head
    missing.fill_(len(claimed))
    maps.lacking.zero_()
    maps.counts[MISSES.value] += len(claimed)


COMPILED = (
    Variant(
        _list_missing_kernel,
        "*i32 *i32 *i32 *i32 *i64 *i32 *i32 i32 i32 i32 i32 i32",
        {"BLOCK_N": BLOCK},
        num_warps=8,
    ),
)
"""For :mod:`kvplug.kernels.compile_check`."""
