"""Which slot holds which page, and which one gives way.

Every use of a slot takes the next number of a clock, so that using one writes one number and no
links. Slots to give way are put in order some at a time: one that was used since is passed over,
and was used later than all that are in the order, so the order stays that of the last use exactly.
An *entry* is a page of one KV head, ``page * Hk + head``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvplug.offload.gather import copy_page

NOWHERE = -1
"""Slot of an entry that is not in the pool; entry of a slot that is empty."""
CLOCK, BEGIN, ORDERED, NEXT, LAST, FREE, STEP = range(7)
"""Places in ``marks``: time; when rows were last looked up; when slots were last put in order, and
first and last of the order that is left; empty slots; steps."""
LATER = 2.0**52
"""Heat of a slot that the step needs later, beside which masses are nothing."""
LEAST = 32
"""Slots that are put in order at a time at least."""
PART = 4
"""One slot in so many is put in order at a time."""


class Slots(NamedTuple):
    """State of one layer's pool; arrays that compiled code works on."""

    slot_of: NDArray[np.int32]
    """``[entries]`` slot of each entry, or NOWHERE."""
    entry_in: NDArray[np.int32]
    """``[slots]`` entry in each slot, or NOWHERE."""
    used: NDArray[np.int64]
    """``[slots]`` time of the last use; -1 for empty ones."""
    order: NDArray[np.int32]
    """``[slots]`` those to give way, the first one first."""
    heat: NDArray[np.float64]
    """``[slots]`` what they were ordered by."""
    mass: NDArray[np.float64]
    """``[slots]`` see :mod:`kvplug.offload.mass`; ``[0]`` where the last use alone counts."""
    free: NDArray[np.int32]
    """``[slots]`` empty ones."""
    marks: NDArray[np.int64]
    """``[7]``, see CLOCK."""

    @classmethod
    def empty(cls, entries: int, slots: int, by_mass: bool = False) -> Slots:
        """A pool with nothing in it."""
        marks = np.zeros(7, np.int64)
        marks[CLOCK], marks[FREE] = 1, slots
        return cls(
            np.full(entries, NOWHERE, np.int32), np.full(slots, NOWHERE, np.int32),
            np.full(slots, -1, np.int64), np.zeros(slots, np.int32), np.zeros(slots),
            np.full(slots if by_mass else 0, -np.inf),
            np.arange(slots, dtype=np.int32)[::-1].copy(), marks,
        )  # fmt: skip

    def check(self) -> None:
        """Asserts that maps agree and that every slot holds an entry or is free."""
        held = np.flatnonzero(self.entry_in != NOWHERE)
        assert (self.slot_of[self.entry_in[held]] == held).all()
        assert (self.slot_of != NOWHERE).sum() == len(held)
        free = np.sort(self.free[: self.marks[FREE]])
        assert (np.flatnonzero(self.entry_in == NOWHERE) == free).all()
        assert (self.used[free] == -1).all()


@njit(cache=True)
def drop(slots, slot):  # type: ignore[no-untyped-def]
    """Empties a slot."""
    slots.slot_of[slots.entry_in[slot]] = NOWHERE
    slots.entry_in[slot], slots.used[slot] = NOWHERE, -1
    slots.free[slots.marks[FREE]] = slot
    slots.marks[FREE] += 1


@njit(cache=True)
def drop_pages(slots, pages, num_kv_heads):  # type: ignore[no-untyped-def]
    """Empties the slots of pages that cannot be used any more."""
    for page in pages:
        for entry in range(page * num_kv_heads, (page + 1) * num_kv_heads):
            if slots.slot_of[entry] != NOWHERE:
                drop(slots, slots.slot_of[entry])


@njit(cache=True)
def rewrite_pages(  # type: ignore[no-untyped-def]
    slots, pages, begun, places, most, entries, into
):
    """Pages were written to: those that begin anew are dropped, others follow in their slots.

    Args:
        slots: The layer's.
        pages: ``[n]`` int64.
        begun: ``[n]`` uint8, whether the first token of each was written.
        places: Of the layer.
        most: Pages of single heads that are copied here; of more, all are listed.
        entries: ``[>= n * Hk]`` int32, written: entries that have to be copied.
        into: Like it, the slots that they go to.

    Returns:
        How many are listed.
    """
    count = 0
    for i in range(pages.shape[0]):
        first = pages[i] * places.num_kv_heads
        for entry in range(first, first + places.num_kv_heads):
            slot = slots.slot_of[entry]
            if slot == NOWHERE:
                continue
            if begun[i]:
                drop(slots, slot)
            else:
                entries[count], into[count] = entry, slot
                count += 1
    if count > most:
        return count
    for i in range(count):
        copy_page(places, entries[i], into[i])
    return 0


@njit(cache=True)
def _sift(heat, order, node, size):  # type: ignore[no-untyped-def]
    """Moves a node of a heap down until none below it is hotter."""
    hot, slot = heat[node], order[node]
    while True:
        child = 2 * node + 1
        if child + 1 < size and heat[child + 1] > heat[child]:
            child += 1
        if child >= size or heat[child] <= hot:
            break
        heat[node], order[node] = heat[child], order[child]
        node = child
    heat[node], order[node] = hot, slot


@njit(cache=True, inline="always")
def _heat_of(slots, slot):  # type: ignore[no-untyped-def]
    """What a slot is ordered by; those that the step needs later give way last."""
    used = np.float64(slots.used[slot])
    if not slots.mass.shape[0]:
        return used
    return LATER + used if used >= slots.marks[BEGIN] else slots.mass[slot]


@njit(cache=True)
def _put_in_order(slots, pinned, wanted):  # type: ignore[no-untyped-def]
    """Orders the ``wanted`` coldest slots that were last used before ``pinned``; how many."""
    heat, order, count = slots.heat, slots.order, 0
    for slot in range(slots.used.shape[0]):
        used = slots.used[slot]
        if not 0 <= used < pinned:
            continue
        now = _heat_of(slots, slot)
        if count < wanted:
            heat[count], order[count] = now, slot
            count += 1
            if count == wanted:
                for node in range(count // 2 - 1, -1, -1):
                    _sift(heat, order, node, count)
        elif now < heat[0]:
            heat[0], order[0] = now, slot
            _sift(heat, order, 0, count)
    if count < wanted:
        for node in range(count // 2 - 1, -1, -1):
            _sift(heat, order, node, count)
    for last in range(count - 1, 0, -1):
        heat[0], heat[last], order[0], order[last] = heat[last], heat[0], order[last], order[0]
        _sift(heat, order, 0, last)
    slots.marks[NEXT], slots.marks[LAST] = 0, count
    slots.marks[ORDERED] = slots.marks[CLOCK]
    return count


@njit(cache=True)
def take(slots, pinned, wanted):  # type: ignore[no-untyped-def]
    """A slot for another entry: an empty one, or else the coldest.

    Args:
        slots: The layer's.
        pinned: Slots that were used at this time or later are not taken.
        wanted: How many will be asked for, about.

    Returns:
        The slot, which may hold an entry; NOWHERE if every one is pinned.
    """
    marks = slots.marks
    if marks[FREE]:
        marks[FREE] -= 1
        return slots.free[marks[FREE]]
    while True:
        while marks[NEXT] < marks[LAST]:
            slot = slots.order[marks[NEXT]]
            marks[NEXT] += 1
            if 0 <= slots.used[slot] < marks[ORDERED]:
                return slot
        part = 0 if slots.mass.shape[0] else slots.used.shape[0] // PART
        # What the step needs later may give way too, so more can be wanted than was lacking.
        if not _put_in_order(slots, pinned, max(wanted, part, LEAST)):
            return NOWHERE


@njit(cache=True)
def find_rows(slots, table, seq_lens, page, out):  # type: ignore[no-untyped-def]
    """Uses what the pool holds of a step's rows.

    Args:
        slots: The layer's.
        table: ``[S * Hk, width]`` int32 entries.
        seq_lens: ``[S * Hk]`` int32 tokens of each row.
        page: P.
        out: ``[S * Hk, width]`` int32, written: slots instead of entries, where there is one.

    Returns:
        Places in the rows whose entry is not held; slots in use.
    """
    begin = now = slots.marks[CLOCK]
    slots.marks[BEGIN] = begin
    lacking = 0
    for row in range(table.shape[0]):
        for n in range((seq_lens[row] + page - 1) // page):
            slot = slots.slot_of[table[row, n]]
            if slot == NOWHERE:
                lacking += 1
                continue
            out[row, n] = slot
            if slots.used[slot] < begin:
                slots.used[slot] = now
                now += 1
    slots.marks[CLOCK] = now
    return lacking, now - begin


@njit(cache=True)
def begin_rows(  # type: ignore[no-untyped-def]
    slots, pages, begun, places, most, entries, into, table, seq_lens, page, out
):
    """:func:`rewrite_pages`, then :func:`find_rows`: all that most steps need, in one call."""
    listed = rewrite_pages(slots, pages, begun, places, most, entries, into)
    lacking, used = find_rows(slots, table, seq_lens, page, out)
    return listed, lacking, used


@njit(cache=True)
def place_rows(  # type: ignore[no-untyped-def]
    slots, table, seq_lens, page, first, heads, lacking, out, entries, into
):
    """Finds a slot for every page of as many windows as fit together.

    What later windows need and the pool holds is the last to give way (:func:`find_rows`).

    Args:
        slots: The layer's.
        table: ``[S * Hk, width]`` int32 entries.
        seq_lens: ``[S * Hk]`` int32 tokens of each row.
        page: P.
        first: First window to place.
        heads: Hk.
        lacking: How many places have no slot.
        out: ``[S * Hk, width]`` int32, written: slots instead of entries.
        entries: ``[slots]`` int32, written: entries that have to be copied.
        into: ``[slots]`` int32, written: the slots that they go to.

    Returns:
        The first window that does not fit, S if all do; entries to copy; slots in use; slots whose
        entry had to give way.
    """
    windows = table.shape[0] // heads
    pinned, missing, used, evicted = slots.marks[CLOCK], 0, 0, 0
    if slots.mass.shape[0]:
        slots.marks[LAST] = 0  # masses have changed
    for w in range(first, windows):
        for row in range(w * heads, (w + 1) * heads):
            for n in range((seq_lens[row] + page - 1) // page):
                entry = table[row, n]
                slot = slots.slot_of[entry]
                if slot == NOWHERE:
                    slot = take(slots, pinned, lacking - missing)
                    if slot == NOWHERE:
                        return w, missing, used, evicted
                    if slots.entry_in[slot] != NOWHERE:
                        slots.slot_of[slots.entry_in[slot]] = NOWHERE
                        evicted += 1
                    slots.slot_of[entry], slots.entry_in[slot] = slot, entry
                    slots.used[slot] = -1
                    if slots.mass.shape[0]:
                        slots.mass[slot] = -np.inf
                    entries[missing], into[missing] = entry, slot
                    missing += 1
                if slots.used[slot] < pinned:
                    slots.used[slot] = slots.marks[CLOCK]
                    slots.marks[CLOCK] += 1
                    used += 1
                out[row, n] = slot
    return windows, missing, used, evicted
