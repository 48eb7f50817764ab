"""Copies pages of single KV heads from the cold store into slots of the hot pool."""

from __future__ import annotations

import numpy as np
from numba import njit, prange, types
from numba.core.types import ExternalFunction

from kvplug.compiled import compiled

# The C library's own, so that pages are read without Python, by all threads.
_pread = ExternalFunction("pread", types.intp(types.int32, types.intp, types.uintp, types.int64))

BYTES_PER_STEP = 64
"""Bytes that a step of a copy moves, to estimate work."""


@compiled()
def read_pages(  # type: ignore[no-untyped-def]
    file, offset, cold, fresh, num_kv_heads, entries, slots, hot, address, failed
):
    """Copies entries of a layer's cache into slots: fresh ones from memory, others from a file.

    A page that was just written is in memory anyway, and cannot fail to be read.

    Args:
        file: Descriptor.
        offset: Where the layer's cache begins in it, bytes.
        cold: ``[pages * Hk, size]`` uint8, the mapped file.
        fresh: ``[pages]`` uint8, whether a page was written in this step.
        num_kv_heads: Hk.
        entries: ``[n]`` int32 which pages, ``page * Hk + head``.
        slots: ``[n]`` int32 where they go.
        hot: ``[slots, size]`` uint8.
        address: Of ``hot``.
        failed: ``[n]`` uint8, written: whether a page could not be read.
    """
    size = cold.shape[1]
    for i in prange(entries.shape[0]):
        entry, slot = np.int64(entries[i]), np.int64(slots[i])
        if fresh[entry // num_kv_heads]:
            hot[slot] = cold[entry]
            failed[i] = 0
        else:
            failed[i] = not _read_all(file, address + slot * size, size, offset + entry * size)


@njit(cache=True)
def _read_all(file, address, size, offset):  # type: ignore[no-untyped-def]
    """Whether ``size`` bytes could be read; a read may give fewer than it was asked for."""
    done = np.int64(0)
    while done < size:
        count = _pread(np.int32(file), address + done, np.uint64(size - done), offset + done)
        if count <= 0:
            return False
        done += count
    return True


@compiled()
def copy_pages(cold, entries, slots, pool):  # type: ignore[no-untyped-def]
    """``pool[slots[i]] = cold[entries[i]]``, rows of bytes."""
    for i in prange(entries.shape[0]):
        pool[slots[i]] = cold[entries[i]]
