"""Which pages of a row: events by rank, neighbours, and the rest, in compiled code.

An event's rank is one number: the order of its score in the high bits, its own number in the low
ones, so that of equal scores the newest event wins. A heap gives events best first, and as many as
are needed.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kvplug.select.bisection import order_of

NUMBER = np.uint64(0xFFFFFFFF)
"""Bits of a rank that hold the event's number."""


@njit(cache=True)
def find_events(pages, starts, most, begin):  # type: ignore[no-untyped-def]
    """Cuts a row's far pages into events.

    Args:
        pages: ``[N]`` physical far pages.
        starts: ``[pages]`` where boundaries were found.
        most: Pages of the longest event.
        begin: ``[N + 1]``, written: first page of each event, then N.

    Returns:
        How many events there are.
    """
    count, length = 0, most
    for n in range(pages.shape[0]):
        if length == most or starts[pages[n]] or n == 0:
            begin[count] = n
            count += 1
            length = 0
        length += 1
    begin[count] = pages.shape[0]
    return count


@njit(cache=True)
def choose_events(  # type: ignore[no-untyped-def]
    scores, begin, count, wanted, contiguous, heap, ranked, taken
):
    """Marks the pages of one row that are selected.

    Args:
        scores: ``[N]``.
        begin: ``[N + 1]``, of ``count`` events; see :func:`find_events`.
        count: Events.
        wanted: Pages to select, at most N.
        contiguous: Of these, the share of neighbours.
        heap: ``[N]`` uint64 scratch.
        ranked: ``[N]`` int32 scratch.
        taken: ``[N]`` uint8, written.
    """
    taken[:] = 0
    _rank(scores, begin, count, heap)
    left, size, found = wanted, count, 0
    while size:
        event = np.int64(heap[0] & NUMBER)
        length, share = begin[event + 1] - begin[event], left - contiguous
        over = length - share
        if share <= 0 or (over > 0 and (over >= share or length > left)):
            break
        size = _pop(heap, size)
        taken[begin[event] : begin[event + 1]] = 1
        ranked[found] = event
        found += 1
        left -= length
    if contiguous:
        left = _take_neighbours(begin, count, ranked[:found], left, taken)
    while left:
        event = np.int64(heap[0] & NUMBER)
        size = _pop(heap, size)
        left = _take_best(scores, begin[event], begin[event + 1], left, taken)


@njit(cache=True)
def _rank(scores, begin, count, heap):  # type: ignore[no-untyped-def]
    """``heap[:count]``: the ranks of the events, the largest first and every node above its two."""
    for event in range(count):
        best = np.uint32(0)
        for n in range(begin[event], begin[event + 1]):
            best = max(best, order_of(scores[n]))
        heap[event] = np.uint64(best) << np.uint64(32) | np.uint64(event)
    for node in range(count // 2 - 1, -1, -1):
        _sift(heap, node, count)


@njit(cache=True)
def _sift(heap, node, size):  # type: ignore[no-untyped-def]
    """Moves a node down until none below it is larger."""
    rank = heap[node]
    while True:
        child = 2 * node + 1
        if child + 1 < size and heap[child + 1] > heap[child]:
            child += 1
        if child >= size or heap[child] <= rank:
            break
        heap[node] = heap[child]
        node = child
    heap[node] = rank


@njit(cache=True)
def _pop(heap, size):  # type: ignore[no-untyped-def]
    """Removes the largest; returns how many are left."""
    heap[0] = heap[size - 1]
    if size > 1:
        _sift(heap, 0, size - 1)
    return size - 1


@njit(cache=True)
def _take_neighbours(begin, count, ranked, left, taken):  # type: ignore[no-untyped-def]
    """Takes the events after and before each ranked one, nearest pages first; what is left."""
    for i in range(ranked.shape[0]):
        event = ranked[i]
        if event + 1 < count:
            for n in range(begin[event + 1], begin[event + 2]):
                if left and not taken[n]:
                    taken[n] = 1
                    left -= 1
        if event > 0:
            for n in range(begin[event] - 1, begin[event - 1] - 1, -1):
                if left and not taken[n]:
                    taken[n] = 1
                    left -= 1
    return left


@njit(cache=True)
def _take_best(scores, first, last, left, taken):  # type: ignore[no-untyped-def]
    """Takes the best pages of an event that are not taken yet; what is left to take."""
    for _ in range(first, last):
        best = -1
        for n in range(first, last):
            if not taken[n] and (best < 0 or order_of(scores[n]) >= order_of(scores[best])):
                best = n
        if left == 0 or best < 0:
            break
        taken[best] = 1
        left -= 1
    return left
