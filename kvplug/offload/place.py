"""Finds slots for what a step attends to, and keeps them true to what it writes."""

from __future__ import annotations

from numba import njit

from kvplug.offload.gather import copy_page
from kvplug.offload.lru import BEGIN, CLOCK, LAST, NOWHERE, drop, take, vacate


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
                if slots.kind.shape[0] and slots.kind[slot]:
                    slots.found[slots.kind[slot]] += 1
                    slots.kind[slot] = 0
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
                    evicted += vacate(slots, slot)
                    slots.slot_of[entry], slots.entry_in[slot] = slot, entry
                    slots.used[slot] = -1
                    entries[missing], into[missing] = entry, slot
                    missing += 1
                if slots.used[slot] < pinned:
                    slots.used[slot] = slots.marks[CLOCK]
                    slots.marks[CLOCK] += 1
                    used += 1
                out[row, n] = slot
    return windows, missing, used, evicted
