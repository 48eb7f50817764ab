"""The hot pool: a layer's pages that attention can read, in front of a cold store.

A slot holds one page of one KV head. Each step the page table's rows are placed: entries that the
pool holds become slots, the others are copied in and the least recently used give way, never a
page that the same call attends to. What does not fit together is attended in turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvplug.compiled import ONE_THREAD_BELOW
from kvplug.offload.ahead import KINDS, ReadAhead
from kvplug.offload.counts import PoolCounts
from kvplug.offload.gather import BYTES_PER_STEP, Places, copy_pages, read_pages
from kvplug.offload.huge_pages import huge_zeros
from kvplug.offload.lru import STEP, Slots, use_events
from kvplug.offload.mass import weigh_rows
from kvplug.offload.place import (
    begin_rows,
    drop_pages,
    find_rows,
    place_rows,
    rewrite_pages,
)
from kvplug.offload.written import Written
from kvplug.pages import single_head_view

if TYPE_CHECKING:
    from kvplug.offload.cold_store import ColdStore
    from kvplug.offload.links import Links


class HotPool:
    """One layer's slots.

    Args:
        kv_cache: ``[pages, Hk, P, 2 * D]`` of the layer, in the cold store.
        store: The store.
        slots: Pages of single KV heads that the pool holds.
        links: Of the cache's pages, where events give way or are read ahead.
    """

    def __init__(
        self, kv_cache: torch.Tensor, store: ColdStore, slots: int, links: Links | None = None
    ) -> None:
        """Allocates the slots (untouched ones cost no memory)."""
        options, self.links = store.offload, links
        cold = single_head_view(kv_cache)
        entries, _, page, width = cold.shape
        self.shape = kv_cache.shape
        self.page, self.num_kv_heads = page, kv_cache.shape[1]
        self.pages = huge_zeros((slots, 1, page, width), kv_cache.dtype)
        """``[slots, 1, P, 2 * D]``: a cache of single heads, as the kernel wants it."""
        self.counts = PoolCounts()
        self.unreadable: set[int] = set()
        """Physical pages that could not be read since :meth:`take_unreadable`."""
        self.store = store
        self._state = Slots.empty(
            entries, slots, by_mass=options.eviction == "mass", ahead=bool(options.prefetch),
            links=None if links is None else links.arrays, by_event=options.eviction == "event",
        )  # fmt: skip
        self._size = page * width * kv_cache.dtype.itemsize
        self._offset = store.offset(kv_cache)
        self._cold = cold.view(torch.uint8).view(entries, -1).numpy()
        self._hot = self.pages.view(torch.uint8).view(slots, -1).numpy()
        self._places = Places(
            cold.data_ptr(), self.pages.data_ptr(), self._size, self.num_kv_heads
        )  # fmt: skip
        self.next: HotPool | None = None
        """The next layer's, where pages are read ahead for it."""
        self._prefetch = options.prefetch
        self._ahead: ReadAhead | None = None
        if options.prefetch:
            memory = kv_cache, self.pages
            self._ahead = ReadAhead(self._state, self._places, store, self._offset, memory)
        self._written = Written(np.empty(0, np.int64), np.empty(0, np.uint8), 0)
        self._entries = np.empty(slots, np.int32)
        self._into = np.empty(slots, np.int32)
        self._failed = np.empty(slots, np.uint8)

    def rewrite(self, written: Written) -> None:
        """Pages were written to: the pool's copies of them follow, or go.

        Args:
            written: By the step that runs; its keys and values are in the cold store.
        """
        self.land()
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
        self.land()
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
            mine = slice(first * heads, last * heads)
            if shares is not None:
                weigh_rows(self._state, slots[mine], shares[mine], seq_lens[mine], self.page)
            if self._state.by_event:
                use_events(self._state, table[mine], seq_lens[mine], self.page)
            if self._ahead is not None and last == windows:
                self._read_ahead(table, seq_lens, in_turns=first > 0)
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

    def land(self) -> None:
        """Takes in what was read ahead."""
        if self._ahead is None:
            return
        read, failed = self._ahead.land()
        self.counts.bytes_read += int(read.sum()) * self._size
        self.counts.failed += failed
        for number, kind in enumerate(KINDS, 1):
            name = f"prefetched_{kind}"
            setattr(self.counts, name, getattr(self.counts, name) + int(read[number]))

    def _read_ahead(self, table: np.ndarray, seq_lens: np.ndarray, in_turns: bool) -> None:
        """Has pages read while the step's last turn, and what comes behind it, is computed.

        A step that fits the pool leaves all its pages there, so only of one that was attended in
        turns is there anything to read for the next.
        """
        assert self._ahead is not None
        rows, written = (table, seq_lens, self.page), self._written.pages
        if self.next is not None and self.next._ahead is not None:
            self.next.land()
            self.next._ahead.want_rows(*rows, written)
            self.next.counts.evictions += self.next._ahead.start()
        if in_turns and "last" in self._prefetch:
            self._ahead.want_again(*rows)
        if "events" in self._prefetch:
            self._ahead.want_around(*rows)
        self.counts.evictions += self._ahead.start()
        for number, kind in enumerate(KINDS, 1):
            setattr(self.counts, f"prefetch_hits_{kind}", int(self._state.found[number]))

    def _rewriting(self, written: Written) -> tuple[Any, ...]:
        """Arguments of :func:`rewrite_pages`."""
        self._written = written
        nbytes = written.tokens * self._size * self.num_kv_heads // self.page
        self.counts.bytes_written += nbytes
        self.store.touched(nbytes)
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
        if self.store.fd is None:
            copy_pages(work, self._places, entries, into)
            return
        failed = self._failed[:missing]
        read_pages(
            work, self.store.fd, self._offset, self._places, self._written.pages, entries, into,
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
        self.land()
        self._state.check()
        held = np.flatnonzero(self._state.entry_in >= 0)
        assert (self._hot[held] == self._cold[self._state.entry_in[held]]).all()
        return True

    def nbytes(self) -> int:
        """Bytes of slots and maps."""
        arrays = [part for part in self._state if isinstance(part, np.ndarray)]
        return self.pages.nbytes + sum(array.nbytes for array in arrays)


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
