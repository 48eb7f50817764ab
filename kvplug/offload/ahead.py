"""Reads pages into slots before anyone asks for them, while other things are computed.

A thread reads by position into slots that hold nothing meanwhile. Before the pool does anything
else, what was read by then is taken in and the rest given up, so no call waits for more than one
page, no slot is out of use while pages are placed, and what a step writes reaches pages that were
read while it wrote. Whether a page was read in time decides where its bytes come from, never which.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvplug.offload.gather import copy_page, holds, read_page
from kvplug.offload.links import LONGEST, NONE, next_in_event
from kvplug.offload.lru import BEGIN, CLOCK, FREE, NOWHERE, STEP, take, vacate

if TYPE_CHECKING:
    from kvplug.offload.cold_store import ColdStore
    from kvplug.offload.gather import Places
    from kvplug.offload.lru import Slots

KINDS = ("last", "events", "next_layer")
"""What can be read ahead; their numbers begin with 1."""
LAST_STEP, EVENTS, NEXT_LAYER = 1, 2, 3
MOST = 256
"""Pages of single KV heads that are read ahead at a time, and at most a quarter of the slots."""
READ, FAILED = 1, 2
COUNT, EVICTED, NUMBER = range(3)


class Asked(NamedTuple):
    """Pages that are being read; compiled code works on it."""

    entries: NDArray[np.int32]
    """``[most]`` which."""
    into: NDArray[np.int32]
    """``[most]`` slots that they go to."""
    kinds: NDArray[np.uint8]
    """``[most]`` why."""
    done: NDArray[np.uint8]
    """``[most]`` READ, FAILED or 0."""
    stop: NDArray[np.uint8]
    """``[1]`` whether to read no more."""
    last: NDArray[np.int64]
    """``[entries]`` number of the last list that each was in."""
    marks: NDArray[np.int64]
    """``[3]`` how many there are; entries that gave way to them; number of the list."""


class ReadAhead:
    """Reads ahead for one layer's pool.

    Args:
        slots: The pool's.
        places: The layer's.
        store: Its cold store.
        offset: Where the layer's cache begins in it, bytes.
        memory: What ``places`` points into; it must outlive every read.
    """

    def __init__(
        self, slots: Slots, places: Places, store: ColdStore, offset: int, memory: tuple[Any, ...]
    ) -> None:
        """Reads nothing yet."""
        self._memory = memory
        most = max(1, min(MOST, len(slots.entry_in) // 4))
        self._asked = Asked(
            np.zeros(most, np.int32), np.zeros(most, np.int32), np.zeros(most, np.uint8),
            np.zeros(most, np.uint8), np.zeros(1, np.uint8),
            np.zeros(len(slots.slot_of), np.int64), np.zeros(3, np.int64),
        )  # fmt: skip
        self._slots, self._places, self._store, self._offset = slots, places, store, offset
        self._lock, self._is_read = threading.Lock(), threading.Event()
        self._waits = self._runs = False

    def land(self) -> tuple[NDArray[np.int64], int]:
        """Takes in what was read and gives up the rest.

        Returns:
            ``[4]`` how many pages of each kind were read, and how many could not be.
        """
        if not self._asked.marks[COUNT]:
            return NONE_READ, 0
        with self._lock:
            self._waits = False
            self._asked.stop[0] = 1
        if self._runs:
            self._is_read.wait()
            self._runs = False
        read = np.zeros(4, np.int64)
        return read, settle(self._slots, self._asked, read)

    def want_rows(
        self, table: np.ndarray, seq_lens: np.ndarray, page: int, written: np.ndarray
    ) -> None:
        """Lists what the layer before attends to; see :func:`reserve_rows`."""
        heads = self._places.num_kv_heads
        reserve_rows(self._slots, self._asked, table, seq_lens, page, heads, written)

    def want_again(self, table: np.ndarray, seq_lens: np.ndarray, page: int) -> None:
        """Lists what a step that was attended in turns began with; see :func:`reserve_again`."""
        heads = self._places.num_kv_heads
        reserve_again(self._slots, self._asked, table, seq_lens, page, heads)

    def want_around(self, table: np.ndarray, seq_lens: np.ndarray, page: int) -> None:
        """Lists what lies around the pages of a step's rows; see :func:`reserve_around`."""
        heads = self._places.num_kv_heads
        reserve_around(self._slots, self._asked, table, seq_lens, page, heads)

    def start(self) -> int:
        """Has the listed pages read; how many entries gave way to them."""
        marks = self._asked.marks
        marks[NUMBER] += 1
        evicted, marks[EVICTED] = int(marks[EVICTED]), 0
        if marks[COUNT]:
            self._asked.done[:] = 0
            self._asked.stop[0] = 0
            self._is_read.clear()
            self._waits = True
            READER.submit(self)
        return evicted

    def warm_up(self) -> None:
        """Compiles what reading ahead calls, on nothing."""
        self.land()
        rows = np.zeros((1, 1), np.int32), np.zeros(1, np.int32), 1
        self.want_rows(*rows, np.zeros(0, np.int64))
        self.want_again(*rows)
        self.want_around(*rows)
        read_listed(-1, self._offset, self._places, self._asked)
        settle(self._slots, self._asked, np.zeros(4, np.int64))

    def read(self) -> None:
        """Reads what is listed, unless it was given up; the reader's thread calls this."""
        with self._lock:
            if not self._waits:
                return
            self._waits, self._runs = False, True
        try:
            fd = -1 if self._store.fd is None else self._store.fd
            read_listed(fd, self._offset, self._places, self._asked)
        finally:
            self._is_read.set()


NONE_READ = np.zeros(4, np.int64)


class Reader:
    """The thread that reads, one a process; what is asked for last is needed first."""

    def __init__(self) -> None:
        """Starts with the first pages."""
        self._work: list[ReadAhead] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, work: ReadAhead) -> None:
        """Has it read."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvplug-ahead", daemon=True)
                self._thread.start()
            if work in self._work:  # given up before it was read
                self._work.remove(work)
            self._work.append(work)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work)
                work = self._work.pop()
            work.read()
            del work


READER = Reader()
"""The process's."""


@njit(cache=True, nogil=True)
def read_listed(file, offset, places, asked):  # type: ignore[no-untyped-def]
    """Reads pages until told to stop; from memory where there is no file (-1)."""
    for i in range(asked.marks[COUNT]):
        if asked.stop[0]:
            return
        if file < 0:
            copy_page(places, asked.entries[i], asked.into[i])
            asked.done[i] = READ
        elif read_page(file, offset, places, asked.entries[i], asked.into[i]):
            asked.done[i] = READ
        else:
            asked.done[i] = FAILED


@njit(cache=True)
def settle(slots, asked, read):  # type: ignore[no-untyped-def]
    """Gives slots what was read for them and frees the others.

    Args:
        slots: The layer's.
        asked: What was listed; empty afterwards.
        read: ``[4]`` int64, written: how many of each kind were read.

    Returns:
        How many could not be read.
    """
    failed = 0
    for i in range(asked.marks[COUNT]):
        entry, slot = asked.entries[i], asked.into[i]
        failed += asked.done[i] == FAILED
        if asked.done[i] == READ:
            slots.slot_of[entry], slots.entry_in[slot] = slot, entry
            slots.kind[slot] = asked.kinds[i]
            read[asked.kinds[i]] += 1
            if slots.mass.shape[0]:
                slots.mass[slot] = slots.marks[STEP] - 1  # as of a tenth of the attention
        else:
            slots.used[slot] = -1
            slots.free[slots.marks[FREE]] = slot
            slots.marks[FREE] += 1
    asked.marks[COUNT] = 0
    return failed


@njit(cache=True)
def _is_wanted(slots, asked, entry):  # type: ignore[no-untyped-def]
    """Whether an entry is neither held nor listed."""
    return slots.slot_of[entry] == NOWHERE and asked.last[entry] != asked.marks[NUMBER] + 1


@njit(cache=True)
def _list(slots, asked, entry, kind, slot):  # type: ignore[no-untyped-def]
    """Lists an entry, for a slot that it takes over."""
    marks = asked.marks
    marks[EVICTED] += vacate(slots, slot)
    slots.used[slot] = slots.marks[CLOCK]
    slots.marks[CLOCK] += 1
    asked.last[entry] = marks[NUMBER] + 1
    count = marks[COUNT]
    asked.entries[count], asked.into[count], asked.kinds[count] = entry, slot, kind
    marks[COUNT] += 1


@njit(cache=True)
def _reserve(slots, asked, entry, kind):  # type: ignore[no-untyped-def]
    """Lists an entry and has the coldest page make room for it; False once no more can be."""
    if not _is_wanted(slots, asked, entry):
        return True
    room = asked.entries.shape[0] - asked.marks[COUNT]
    slot = take(slots, slots.marks[BEGIN], room) if room else NOWHERE
    if slot != NOWHERE:
        _list(slots, asked, entry, kind, slot)
    return slot != NOWHERE


@njit(cache=True)
def reserve_rows(  # type: ignore[no-untyped-def]
    slots, asked, table, seq_lens, page, num_kv_heads, written
):
    """Lists the entries of rows, but for pages that the step writes: they are not whole yet.

    Args:
        slots: The next layer's.
        asked: The list.
        table: ``[S * Hk, width]`` int32 entries.
        seq_lens: ``[S * Hk]`` int32 tokens of each row.
        page: P.
        num_kv_heads: Hk.
        written: ``[n]`` int64 pages that this step writes, ascending.
    """
    for row in range(table.shape[0]):
        for n in range((seq_lens[row] + page - 1) // page):
            entry = table[row, n]
            if holds(written, entry // num_kv_heads):
                continue
            if not _reserve(slots, asked, entry, NEXT_LAYER):
                return


@njit(cache=True)
def reserve_again(slots, asked, table, seq_lens, page, heads):  # type: ignore[no-untyped-def]
    """Lists what the first windows of a step attended to and the pool has no more.

    The next step begins with these windows. What is used last in it makes room: pages of the last
    windows but those that are being attended to, and never of a window before the one that gains.

    Args:
        slots: The layer's.
        asked: The list.
        table: ``[S * Hk, width]`` int32 entries.
        seq_lens: ``[S * Hk]`` int32 tokens of each row.
        page: P.
        heads: Hk.
    """
    last, m = table.shape[0] - 1, -1
    for row in range(table.shape[0]):
        for n in range((seq_lens[row] + page - 1) // page):
            if not _is_wanted(slots, asked, table[row, n]):
                continue
            slot = NOWHERE
            while slot == NOWHERE or not 0 <= slots.used[slot] < slots.marks[BEGIN]:
                m += 1
                if m >= (seq_lens[last] + page - 1) // page:
                    last, m = last - 1, 0
                if last // heads <= row // heads:
                    return
                slot = slots.slot_of[table[last, m]]
            if asked.marks[COUNT] == asked.entries.shape[0]:
                return
            _list(slots, asked, table[row, n], LAST_STEP, slot)


@njit(cache=True)
def _reserve_event(slots, asked, head, kv_head, num_kv_heads):  # type: ignore[no-untyped-def]
    """Lists an event for one KV head; its last page, or NONE once no more can be listed."""
    page = head
    for _ in range(LONGEST):
        if not _reserve(slots, asked, page * num_kv_heads + kv_head, EVENTS):
            return NONE
        after = next_in_event(slots.links, page, head)
        if after == NONE:
            break
        page = after
    return page


@njit(cache=True)
def reserve_around(slots, asked, table, seq_lens, page, num_kv_heads):  # type: ignore[no-untyped-def]
    """Lists, for each far page of the rows, the rest of its event, the next one and the last.

    Args:
        slots: The layer's, with links.
        asked: The list.
        table: ``[S * Hk, width]`` int32 entries.
        seq_lens: ``[S * Hk]`` int32 tokens of each row.
        page: P.
        num_kv_heads: Hk.
    """
    links = slots.links
    for row in range(table.shape[0]):
        for n in range((seq_lens[row] + page - 1) // page):
            this, kv_head = table[row, n] // num_kv_heads, table[row, n] % num_kv_heads
            head = links.head[this]
            if head == NONE:
                continue
            last = _reserve_event(slots, asked, head, kv_head, num_kv_heads)
            if last == NONE:
                return
            for beside in (links.after[last], links.before[head]):
                if beside != NONE and links.head[beside] != NONE:
                    other = links.head[beside]
                    if _reserve_event(slots, asked, other, kv_head, num_kv_heads) == NONE:
                        return
