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

from kvplug.offload.links import LONGEST, NONE, LinkArrays, next_in_event

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
    kind: NDArray[np.uint8]
    """``[slots]`` why each was read ahead, until it is used; ``[0]`` where nothing is."""
    found: NDArray[np.int64]
    """``[4]`` how many of each kind were used."""
    links: LinkArrays
    """Of the cache's pages; ``[0]`` where neither events give way nor neighbours are read."""
    by_event: bool
    """Whether whole events give way."""

    @classmethod
    def empty(
        cls, entries: int, slots: int, by_mass: bool = False, ahead: bool = False,
        links: LinkArrays | None = None, by_event: bool = False,
    ) -> Slots:  # fmt: skip
        """A pool with nothing in it."""
        marks = np.zeros(7, np.int64)
        marks[CLOCK], marks[FREE] = 1, slots
        return cls(
            np.full(entries, NOWHERE, np.int32), np.full(slots, NOWHERE, np.int32),
            np.full(slots, -1, np.int64), np.zeros(slots, np.int32), np.zeros(slots),
            np.full(slots if by_mass else 0, -np.inf),
            np.arange(slots, dtype=np.int32)[::-1].copy(), marks,
            np.zeros(slots if ahead else 0, np.uint8), np.zeros(4, np.int64),
            LinkArrays.empty(0) if links is None else links, by_event,
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
    if slots.kind.shape[0]:
        slots.kind[slot] = 0
    slots.free[slots.marks[FREE]] = slot
    slots.marks[FREE] += 1


@njit(cache=True)
def vacate(slots, slot):  # type: ignore[no-untyped-def]
    """Makes a slot of :func:`take` hold nothing; where events give way, the rest of its goes too.

    Returns how many entries left the pool. What the step that runs uses stays.
    """
    entry, count = slots.entry_in[slot], 0
    if slots.kind.shape[0]:
        slots.kind[slot] = 0
    if slots.mass.shape[0]:
        slots.mass[slot] = -np.inf
    if entry == NOWHERE:
        return 0
    slots.slot_of[entry] = slots.entry_in[slot] = NOWHERE
    if slots.by_event:
        heads = slots.slot_of.shape[0] // slots.links.head.shape[0]
        head = slots.links.head[entry // heads]
        page = head
        for _ in range(LONGEST):
            if page == NONE:
                break
            other = slots.slot_of[page * heads + entry % heads]
            if other != NOWHERE and slots.used[other] < slots.marks[BEGIN]:
                drop(slots, other)
                count += 1
            page = next_in_event(slots.links, page, head)
    return count + 1


@njit(cache=True)
def use_events(slots, table, seq_lens, page):  # type: ignore[no-untyped-def]
    """What the pool holds of events that rows attend to counts as used with them.

    Args:
        slots: The layer's.
        table: ``[n, width]`` int32 entries.
        seq_lens: ``[n]`` int32 tokens of each row.
        page: P.
    """
    begin, links = slots.marks[CLOCK], slots.links
    heads = slots.slot_of.shape[0] // links.head.shape[0]
    for row in range(table.shape[0]):
        for n in range((seq_lens[row] + page - 1) // page):
            head, kv_head = links.head[table[row, n] // heads], table[row, n] % heads
            if head == NONE:
                continue
            this = head
            for _ in range(LONGEST):
                slot = slots.slot_of[this * heads + kv_head]
                if slot != NOWHERE and slots.used[slot] < begin:
                    slots.used[slot] = slots.marks[CLOCK]
                    slots.marks[CLOCK] += 1
                this = next_in_event(links, this, head)
                if this == NONE:
                    break


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
