"""Which slot holds which page, and which one gives way: least recently used, in constant time.

Slots form a ring in the order of their last use: ``newer[s]`` and ``older[s]`` are neighbours, and
the entry behind the last slot is the ring's head, whose ``older`` is the newest slot and whose
``newer`` is the oldest. An *entry* is a page of one KV head, ``page * Hk + head``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

NOWHERE = -1
"""Slot of an entry that is not in the pool; entry of a slot that is empty."""


class Slots(NamedTuple):
    """State of one layer's pool; arrays that compiled code works on."""

    slot_of: NDArray[np.int32]
    """``[entries]`` slot of each entry, or NOWHERE."""
    entry_in: NDArray[np.int32]
    """``[slots]`` entry in each slot, or NOWHERE."""
    newer: NDArray[np.int32]
    """``[slots + 1]``."""
    older: NDArray[np.int32]
    """``[slots + 1]``."""
    used: NDArray[np.int64]
    """``[slots]`` number of the last round in which each was used; those of this one stay."""

    @classmethod
    def empty(cls, entries: int, slots: int) -> Slots:
        """A pool with nothing in it."""
        ring = np.arange(slots + 1, dtype=np.int32)
        count = slots + 1
        return cls(
            np.full(entries, NOWHERE, np.int32), np.full(slots, NOWHERE, np.int32),
            np.roll(ring, 1), (ring + 1) % count, np.full(slots, -1, np.int64),
        )  # fmt: skip

    def check(self) -> None:
        """Asserts that maps agree and that the ring holds every slot once."""
        held = np.flatnonzero(self.entry_in != NOWHERE)
        assert (self.slot_of[self.entry_in[held]] == held).all()
        assert (self.slot_of != NOWHERE).sum() == len(held)
        head = len(self.entry_in)
        seen, slot = [], self.older[head]
        while slot != head:
            seen.append(int(slot))
            assert self.newer[self.older[slot]] == slot
            slot = self.older[slot]
        assert sorted(seen) == list(range(head))


@njit(cache=True, inline="always")
def _unlink(slots, slot):  # type: ignore[no-untyped-def]
    slots.older[slots.newer[slot]] = slots.older[slot]
    slots.newer[slots.older[slot]] = slots.newer[slot]


@njit(cache=True, inline="always")
def _link_behind(slots, slot, place):  # type: ignore[no-untyped-def]
    """Puts a slot on the older side of ``place``."""
    below = slots.older[place]
    slots.older[place], slots.newer[slot] = slot, place
    slots.older[slot], slots.newer[below] = below, slot


@njit(cache=True)
def forget_pages(slots, pages, num_kv_heads):  # type: ignore[no-untyped-def]
    """Empties the slots of pages that were written to; they are the first to give way."""
    head = slots.entry_in.shape[0]
    for page in pages:
        for h in range(num_kv_heads):
            slot = slots.slot_of[page * num_kv_heads + h]
            if slot != NOWHERE:
                slots.slot_of[page * num_kv_heads + h] = NOWHERE
                slots.entry_in[slot] = NOWHERE
                _unlink(slots, slot)
                _link_behind(slots, slot, slots.newer[head])


@njit(cache=True)
def _renew(slots, table, seq_lens, page):  # type: ignore[no-untyped-def]
    """What a step asks for and the pool has is the last to give way to what it has not."""
    head = slots.entry_in.shape[0]
    for row in range(table.shape[0]):
        for n in range((seq_lens[row] + page - 1) // page):
            slot = slots.slot_of[table[row, n]]
            if slot != NOWHERE:
                _unlink(slots, slot)
                _link_behind(slots, slot, head)


@njit(cache=True)
def place_rows(  # type: ignore[no-untyped-def]
    slots, table, seq_lens, page, first, heads, round_number, out, entries, into
):
    """Finds a slot for every page of as many windows as fit together.

    Args:
        slots: The layer's.
        table: ``[S * Hk, width]`` int32 entries.
        seq_lens: ``[S * Hk]`` int32 tokens of each row.
        page: P.
        first: First window to place.
        heads: Hk.
        round_number: Of this call; slots used in it are not taken.
        out: ``[S * Hk, width]`` int32, written: slots instead of entries.
        entries: ``[slots]`` int32, written: entries that have to be copied.
        into: ``[slots]`` int32, written: the slots that they go to.

    Returns:
        The first window that does not fit, S if all do; entries to copy; slots in use; slots whose
        entry had to give way.
    """
    windows, head = table.shape[0] // heads, slots.entry_in.shape[0]
    missing, pinned, evicted = 0, 0, 0
    _renew(slots, table[first * heads :], seq_lens[first * heads :], page)
    for w in range(first, windows):
        for row in range(w * heads, (w + 1) * heads):
            for n in range((seq_lens[row] + page - 1) // page):
                entry = table[row, n]
                slot = slots.slot_of[entry]
                if slot == NOWHERE:
                    slot = slots.newer[head]
                    if slots.used[slot] == round_number:
                        return w, missing, pinned, evicted
                    if slots.entry_in[slot] != NOWHERE:
                        slots.slot_of[slots.entry_in[slot]] = NOWHERE
                        evicted += 1
                    slots.slot_of[entry], slots.entry_in[slot] = slot, entry
                    entries[missing], into[missing] = entry, slot
                    missing += 1
                if slots.used[slot] != round_number:
                    slots.used[slot] = round_number
                    pinned += 1
                    _unlink(slots, slot)
                    _link_behind(slots, slot, head)
                out[row, n] = slot
    return windows, missing, pinned, evicted
