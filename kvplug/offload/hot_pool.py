"""The hot pool: a layer's pages that attention can read, in front of a cold store.

A slot holds one page of one KV head. Each step the page table's rows are placed: entries that the
pool holds become slots, the others are copied in and the least recently used give way, never a
page that the same call attends to. What does not fit together is attended in turns.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvplug.compiled import ONE_THREAD_BELOW
from kvplug.offload.gather import BYTES_PER_STEP, Places, copy_pages, read_pages
from kvplug.offload.lru import (
    STEP,
    Slots,
    begin_rows,
    drop_pages,
    find_rows,
    place_rows,
    rewrite_pages,
)
from kvplug.offload.mass import weigh_rows
from kvplug.offload.written import Written
from kvplug.pages import single_head_view

if TYPE_CHECKING:
    from kvplug.offload.cold_store import ColdStore


HUGE_PAGE = 2**21
"""Bytes that the system maps at once where it can; the pool starts at a multiple of it."""


@dataclass
class PoolCounts:
    """What a pool has done since it was made."""

    hits: int = 0
    """Pages of single KV heads that were there when a call asked for them."""
    misses: int = 0
    """Those that had to be copied in."""
    evictions: int = 0
    """Those that gave way."""
    bytes_read: int = 0
    """From the cold store."""
    bytes_written: int = 0
    """Of new keys and values, which go to the cold store."""
    failed: int = 0
    """Pages that could not be read."""
    turns: int = 0
    """Calls of attention; more than steps where a step did not fit at once."""
    stall_s: float = 0.0
    """Seconds that attention waited for pages."""

    def __add__(self, other: PoolCounts) -> PoolCounts:
        """Sums, for all layers together."""
        names = [field.name for field in fields(self)]
        return PoolCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})


class HotPool:
    """One layer's slots.

    Args:
        kv_cache: ``[pages, Hk, P, 2 * D]`` of the layer, in the cold store.
        store: The store.
        slots: Pages of single KV heads that the pool holds.
        by_mass: Whether pages give way by attention mass, or by their last use alone.
    """

    def __init__(
        self, kv_cache: torch.Tensor, store: ColdStore, slots: int, by_mass: bool = False
    ) -> None:
        """Allocates the slots (untouched ones cost no memory)."""
        cold = single_head_view(kv_cache)
        entries, _, page, width = cold.shape
        self.page, self.num_kv_heads = page, kv_cache.shape[1]
        self.pages = _huge_zeros((slots, 1, page, width), kv_cache.dtype)
        """``[slots, 1, P, 2 * D]``: a cache of single heads, as the kernel wants it."""
        self.counts = PoolCounts()
        self.unreadable: set[int] = set()
        """Physical pages that could not be read since :meth:`take_unreadable`."""
        self._store = store
        self._state = Slots.empty(entries, slots, by_mass)
        self._size = page * width * kv_cache.dtype.itemsize
        self._offset = store.offset(kv_cache)
        self._cold = cold.view(torch.uint8).view(entries, -1).numpy()
        self._hot = self.pages.view(torch.uint8).view(slots, -1).numpy()
        self._places = Places(
            cold.data_ptr(), self.pages.data_ptr(), self._size, self.num_kv_heads
        )  # fmt: skip
        self._written = Written(np.empty(0, np.int64), np.empty(0, np.uint8), 0)
        self._entries = np.empty(slots, np.int32)
        self._into = np.empty(slots, np.int32)
        self._failed = np.empty(slots, np.uint8)

    def rewrite(self, written: Written) -> None:
        """Pages were written to: the pool's copies of them follow, or go.

        Args:
            written: By the step that runs; its keys and values are in the cold store.
        """
        self._follow(rewrite_pages(self._state, *self._rewriting(written)))

    def turns(
        self, table: np.ndarray, seq_lens: np.ndarray, slots: np.ndarray, written: Written,
        shares: np.ndarray | None = None,
    ) -> Iterator[tuple[int, int]]:  # fmt: skip
        """Brings in the pages of a step's rows, as many windows at a time as fit.

        Args:
            table: ``[S * Hk, width]`` int32 entries: the step's page table, with the layer's pages.
            seq_lens: ``[S * Hk]`` int32 tokens of each row.
            slots: ``[S * Hk, width]`` int32, written: the table with slots for pages; rows of a
                turn hold until the next one.
            written: By the step, as for :meth:`rewrite`.
            shares: ``[S * Hk, width]`` float32 attention mass, where pages give way by it.

        Yields:
            The first window of a turn, and the one behind its last.
        """
        start = time.perf_counter()
        listed, lacking, used = begin_rows(
            self._state, *self._rewriting(written), table, seq_lens, self.page, slots
        )
        self._follow(listed)
        self._state.marks[STEP] += 1
        counts, heads = self.counts, self.num_kv_heads
        windows, first = len(table) // heads, 0
        while True:
            last = windows
            if lacking:
                last, missing, used, evicted = place_rows(
                    self._state, table, seq_lens, self.page, first, heads, lacking, slots,
                    self._entries, self._into,
                )  # fmt: skip
                assert last > first, "the pool is smaller than one window's pages"
                self._copy(missing)
                counts.misses += missing
                counts.hits -= missing
                counts.evictions += evicted
            if shares is not None:
                turn = slice(first * heads, last * heads)
                weigh_rows(self._state, slots[turn], shares[turn], seq_lens[turn], self.page)
            counts.hits += used
            counts.turns += 1
            counts.stall_s += time.perf_counter() - start
            yield first, last
            if last == windows:
                return
            start, first = time.perf_counter(), last
            rest = slice(first * heads, None)
            lacking, used = find_rows(
                self._state, table[rest], seq_lens[rest], self.page, slots[rest]
            )

    def _rewriting(self, written: Written) -> tuple[Any, ...]:
        """Arguments of :func:`rewrite_pages`."""
        self._written = written
        nbytes = written.tokens * self._size * self.num_kv_heads // self.page
        self.counts.bytes_written += nbytes
        self._store.touched(nbytes)
        most = ONE_THREAD_BELOW * BYTES_PER_STEP // self._size
        return (
            written.pages, written.begun, self._places, most, self._entries, self._into,
        )  # fmt: skip

    def _follow(self, listed: int) -> None:
        """Copies what :func:`rewrite_pages` listed, from memory."""
        if listed:
            entries, into = self._entries[:listed], self._into[:listed]
            copy_pages(listed * self._size // BYTES_PER_STEP, self._places, entries, into)

    def _copy(self, missing: int) -> None:
        """Copies the first ``missing`` of the listed entries."""
        if not missing:
            return
        entries, into = self._entries[:missing], self._into[:missing]
        self.counts.bytes_read += missing * self._size
        work = missing * self._size // BYTES_PER_STEP
        if self._store.fd is None:
            copy_pages(work, self._places, entries, into)
            return
        failed = self._failed[:missing]
        read_pages(
            work, self._store.fd, self._offset, self._places, self._written.pages, entries, into,
            failed,
        )  # fmt: skip
        if failed.any():
            self._give_up(entries[failed > 0], into[failed > 0])

    def _give_up(self, entries: np.ndarray, into: np.ndarray) -> None:
        """Pages that could not be read: none is kept, and whoever needs them must fail."""
        self._hot[into] = 0
        pages = np.unique(entries // self.num_kv_heads)
        drop_pages(self._state, pages, self.num_kv_heads)
        self.unreadable.update(pages.tolist())
        self.counts.failed += len(entries)

    def take_unreadable(self) -> set[int]:
        """Pages that could not be read since this was last asked."""
        pages, self.unreadable = self.unreadable, set()
        return pages

    def check_integrity(self) -> bool:
        """Whether maps agree and every held page equals the cold store's, byte by byte.

        Raises:
            AssertionError: They do not.
        """
        self._state.check()
        held = np.flatnonzero(self._state.entry_in >= 0)
        assert (self._hot[held] == self._cold[self._state.entry_in[held]]).all()
        return True

    def nbytes(self) -> int:
        """Bytes of slots and maps."""
        return self.pages.nbytes + sum(array.nbytes for array in self._state)


def _huge_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in the system's large pages, if it has them: slots are used in no order."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_PAGE
    return whole[first : first + nbytes].view(dtype).view(shape)


def warm_up(kv_cache: torch.Tensor, store: ColdStore, by_mass: bool = False) -> None:
    """Compiles what a pool calls, on the first pages of a layer, before there is anything in them.

    Args:
        kv_cache: ``[pages, Hk, P, 2 * D]``, at least two pages.
        store: What it is in.
        by_mass: See :class:`HotPool`.
    """
    _, heads, page, _ = kv_cache.shape
    pool = HotPool(kv_cache[:2], store, 2 * heads, by_mass)
    written = Written.of(torch.tensor([0, 1]), page)
    table = np.ascontiguousarray(np.arange(2 * heads, dtype=np.int32).reshape(2, heads).T)
    table = np.concatenate((table, table))
    lengths, slots = np.full(2 * heads, 2 * page, np.int32), np.empty_like(table)
    shares = np.ones(table.shape, np.float32) if by_mass else None
    for _ in pool.turns(table, lengths, slots, written, shares):
        pass
    pool.rewrite(written)
    find_rows(pool._state, table, lengths, page, slots)
    one = np.zeros(1, np.int32)
    copy_pages(0, pool._places, one, one)


def slots_for(hot_gib: float, num_layers: int, page_bytes: int) -> int:
    """Slots of each layer's pool, for all layers' pools together to take ``hot_gib``.

    Args:
        hot_gib: GiB of all pools.
        num_layers: Layers that retrieve.
        page_bytes: Of a page of one KV head, keys and values.
    """
    return int(hot_gib * 2**30 / num_layers) // page_bytes


def least_slots(pages_per_row: int, num_kv_heads: int) -> int:
    """Slots that one window needs: pages of a row, for every KV head."""
    return pages_per_row * num_kv_heads
