"""Copies pages of single KV heads from the cold store into slots of the hot pool."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange, types
from numba.core.types import ExternalFunction

from kvplug.compiled import compiled

# The C library's own, so that pages are read without Python, by all threads, and copied as fast as
# the machine can.
_pread = ExternalFunction("pread", types.intp(types.int32, types.intp, types.uintp, types.int64))
_memcpy = ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.uintp))

BYTES_PER_STEP = 64
"""Bytes that a step of a copy moves, to estimate work."""


class Places(NamedTuple):
    """Where a layer's pages of single KV heads are; compiled code works on it."""

    cold: int
    """Address of the layer's cache in the cold store."""
    hot: int
    """Address of the slots."""
    size: int
    """Bytes of a page of one KV head."""
    num_kv_heads: int
    """Hk."""


@compiled()
def read_pages(  # type: ignore[no-untyped-def]
    file, offset, places, written, entries, slots, failed
):
    """Copies entries of a layer's cache into slots: new ones from memory, others from a file.

    A page that was just written is in memory anyway, and cannot fail to be read.

    Args:
        file: Descriptor.
        offset: Where the layer's cache begins in it, bytes.
        places: Of the layer.
        written: ``[n]`` int64 pages that this step wrote, ascending.
        entries: ``[n]`` int32 which pages, ``page * Hk + head``.
        slots: ``[n]`` int32 where they go.
        failed: ``[n]`` uint8, written: whether a page could not be read.
    """
    for i in prange(entries.shape[0]):
        if holds(written, entries[i] // places.num_kv_heads):
            copy_page(places, entries[i], slots[i])
            failed[i] = 0
        else:
            failed[i] = not read_page(file, offset, places, entries[i], slots[i])


@compiled()
def copy_pages(places, entries, slots):  # type: ignore[no-untyped-def]
    """Copies entries into slots from memory; see :func:`read_pages`."""
    for i in prange(entries.shape[0]):
        copy_page(places, entries[i], slots[i])


@njit(cache=True)
def copy_page(places, entry, slot):  # type: ignore[no-untyped-def]
    """Copies one entry into a slot, from memory."""
    size = places.size
    _memcpy(
        places.hot + np.int64(slot) * size, places.cold + np.int64(entry) * size, np.uint64(size)
    )


@njit(cache=True)
def read_page(file, offset, places, entry, slot):  # type: ignore[no-untyped-def]
    """Whether one entry could be read into a slot; a read may give fewer bytes than asked for."""
    size, done = places.size, np.int64(0)
    address, offset = places.hot + np.int64(slot) * size, offset + np.int64(entry) * size
    while done < size:
        count = _pread(np.int32(file), address + done, np.uint64(size - done), offset + done)
        if count <= 0:
            return False
        done += count
    return True


@njit(cache=True)
def holds(ascending, number):  # type: ignore[no-untyped-def]
    """Whether a number is among others."""
    place = np.searchsorted(ascending, number)
    return place < ascending.shape[0] and ascending[place] == number
