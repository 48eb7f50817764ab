"""Which slot of a hot pool holds which page of which KV head, on the device.

The twin on CPU is :mod:`kvplug.offload.lru`. An *entry* is a page of one KV head. A step's rows are
placed in turns, each of which takes the next two numbers of a clock: :mod:`.keep_slots` stamps what
later turns of the step need with the first, :mod:`.find_slots` looks entries up and stamps the
slots that the turn uses with the second, :mod:`.list_missing` lists what the pool lacks,
:mod:`.take_slots` finds slots for it, :mod:`.gather_pages` fills them, and :mod:`.slot_rows` writes
the rows with slots for pages. The host reads nothing of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, check_page
from kvplug.kernels.page_rows import PageRows

NOWHERE = tl.constexpr(-1)
"""Slot of an entry that the pool lacks; entry of an empty slot."""
CLAIMED = tl.constexpr(-(2**31))
"""What a missing entry's slot is while a turn is placed: this plus its first place in the rows."""
HITS, MISSES, EVICTIONS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Places in ``counts``."""


class SlotMaps(NamedTuple):
    """State of one layer's pool, and what it counted."""

    slot_of: torch.Tensor
    """``[pages, Hk]`` int32 slot of each entry, or NOWHERE; claims while a turn is placed."""
    entry_in: torch.Tensor
    """``[slots]`` int32 entry in each slot, ``page * Hk + head``, or NOWHERE."""
    used: torch.Tensor
    """``[slots]`` int64 stamp of the last use; 0 for empty ones."""
    clock: torch.Tensor
    """``[1]`` int64 first stamp of the turn that is placed, from 1 on."""
    lacking: torch.Tensor
    """``[1]`` int32 places in the turn's rows whose entry has no slot."""
    counts: torch.Tensor
    """``[3]`` int64 entries that were there when a turn asked, that were not, and that gave way."""

    @classmethod
    def empty(cls, pages: int, heads: int, slots: int, counts: torch.Tensor) -> SlotMaps:
        """Of a pool with nothing in it.

        Args:
            pages: Of the cold store.
            heads: Hk.
            slots: Of the pool.
            counts: ``[3]`` int64 on the device.
        """
        device = counts.device
        return cls(
            torch.full((pages, heads), NOWHERE.value, dtype=torch.int32, device=device),
            torch.full((slots,), NOWHERE.value, dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.int64, device=device),
            torch.ones(1, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            counts,
        )

    def check(self) -> None:
        """Refuses what kernels would read or write wrongly.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device.
        """
        check("slot_of", self.slot_of, ("pages", "Hk"), torch.int32)
        check("entry_in", self.entry_in, ("slots",), torch.int32)
        check("used", self.used, tuple(self.entry_in.shape), torch.int64)
        check("clock", self.clock, (1,), torch.int64)
        check("lacking", self.lacking, (1,), torch.int32)
        check("counts", self.counts, (3,), torch.int64)
        check_devices(**self._asdict())

    def check_rows(self, rows: PageRows, page: int) -> None:
        """Refuses rows that do not fit, besides what :meth:`check` refuses.

        Args:
            rows: ``n * Hk`` of them.
            page: P.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device, or the page size is
                not supported.
        """
        self.check()
        num = rows.table.shape[0] // self.slot_of.shape[1] * self.slot_of.shape[1]
        check("table", rows.table, (num, "W"), torch.int32)
        check("lengths", rows.lengths, (num,), torch.int32)
        check_devices(slot_of=self.slot_of, **rows._asdict())
        check_page(page)

    def entries_of(self, rows: PageRows, page: int) -> list[tuple[int, int, int]]:
        """Place in the rows, page and head of all that they list; waits for the device: for twins.

        Args:
            rows: ``n * Hk`` of them.
            page: P.
        """
        heads, width = self.slot_of.shape[1], rows.table.shape[1]
        return [
            (row * width + n, number, row % heads)
            for row, length in enumerate(rows.lengths.tolist())
            for n, number in enumerate(rows.table[row, : -(-length // page)].tolist())
        ]


@triton.jit
def listed_entries(p_table, p_lengths, i_row, o_n, width, page, heads):  # type: ignore[no-untyped-def]
    """Entries, int64, at places ``o_n`` of rows ``i_row``, and which places list one."""
    m_n = (o_n < tl.cdiv(tl.load(p_lengths + i_row), page)) & (o_n < width)
    b_page = tl.load(p_table + i_row.to(tl.int64) * width + o_n, mask=m_n, other=0)
    return b_page.to(tl.int64) * heads + i_row % heads, m_n
