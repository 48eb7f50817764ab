"""The hot pool: a layer's pages that attention can read, in front of a cold store.

A slot holds one page of one KV head. Each step the page table's rows are placed: entries that the
pool holds become slots, the others are copied in and the least recently used give way, never a
page that the same call attends to. What does not fit together is attended in turns.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kvplug.offload.gather import BYTES_PER_STEP, copy_pages, read_pages
from kvplug.offload.lru import Slots, forget_pages, place_rows
from kvplug.pages import single_head_view
from kvplug.workspace import Workspace

if TYPE_CHECKING:
    from kvplug.offload.cold_store import ColdStore


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


class Turn(NamedTuple):
    """Windows whose pages are in the pool together."""

    first: int
    """First of them."""
    last: int
    """The one behind the last."""
    slots: torch.Tensor
    """``[S * Hk, width]`` int32: the page table with slots for pages; rows of the turn count."""


class HotPool:
    """One layer's slots.

    Args:
        kv_cache: ``[pages, Hk, P, 2 * D]`` of the layer, in the cold store.
        store: The store.
        slots: Pages of single KV heads that the pool holds.
    """

    def __init__(self, kv_cache: torch.Tensor, store: ColdStore, slots: int) -> None:
        """Allocates the slots (untouched ones cost no memory)."""
        cold = single_head_view(kv_cache)
        entries, _, page, width = cold.shape
        self.page, self.num_kv_heads = page, kv_cache.shape[1]
        self.pages = torch.zeros((slots, 1, page, width), dtype=kv_cache.dtype)
        """``[slots, 1, P, 2 * D]``: a cache of single heads, as the kernel wants it."""
        self.counts = PoolCounts()
        self.unreadable: set[int] = set()
        """Physical pages that could not be read since :meth:`take_unreadable`."""
        self._store = store
        self._state = Slots.empty(entries, slots)
        self._size = page * width * kv_cache.dtype.itemsize
        self._offset = store.offset(kv_cache)
        self._cold = cold.view(torch.uint8).view(entries, -1).numpy()
        self._hot = self.pages.view(torch.uint8).view(slots, -1).numpy()
        self._round = 0
        self._fresh = np.zeros(len(kv_cache), np.uint8)
        self._written = np.empty(0, np.int64)
        self._entries = np.empty(slots, np.int32)
        self._into = np.empty(slots, np.int32)
        self._failed = np.empty(slots, np.uint8)

    def forget(self, slots: torch.Tensor) -> None:
        """Pages were written to: what the pool holds of them is old.

        Args:
            slots: ``[T]`` int64 where keys were written; negative ones are padding.
        """
        tokens = slots.numpy()
        tokens = tokens[tokens >= 0]
        pages = tokens[:1] // self.page if len(tokens) == 1 else np.unique(tokens // self.page)
        forget_pages(self._state, pages, self.num_kv_heads)
        self._fresh[self._written] = 0
        self._fresh[pages] = 1
        self._written = pages
        written = len(tokens) * self._size * self.num_kv_heads // self.page
        self.counts.bytes_written += written
        self._store.touched(written)

    def turns(
        self, table: torch.Tensor, seq_lens: torch.Tensor, workspace: Workspace
    ) -> Iterator[Turn]:
        """Brings in the pages of a step's rows, as many windows at a time as fit.

        Args:
            table: ``[S * Hk, width]`` int32 entries: the step's page table, with the layer's pages.
            seq_lens: ``[S * Hk]`` int32 tokens of each row.
            workspace: Owns the slots of a turn, until the next one.
        """
        slots = workspace.take("hot.slots", tuple(table.shape), torch.int32)
        windows, first = len(table) // self.num_kv_heads, 0
        while first < windows:
            start = time.perf_counter()
            self._round += 1
            last, missing, pinned, evicted = place_rows(
                self._state, table.numpy(), seq_lens.numpy(), self.page, first,
                self.num_kv_heads, self._round, slots.numpy(), self._entries, self._into,
            )  # fmt: skip
            assert last > first, "the pool is smaller than one window's pages"
            if missing:
                self._copy(missing)
            self._count(missing, pinned, evicted, time.perf_counter() - start)
            yield Turn(first, last, slots)
            first = last

    def _copy(self, missing: int) -> None:
        """Copies the first ``missing`` of the listed entries."""
        entries, into = self._entries[:missing], self._into[:missing]
        work = missing * self._size // BYTES_PER_STEP
        if self._store.fd is None:
            copy_pages(work, self._cold, entries, into, self._hot)
            return
        failed = self._failed[:missing]
        read_pages(
            work, self._store.fd, self._offset, self._cold, self._fresh, self.num_kv_heads,
            entries, into, self._hot, self.pages.data_ptr(), failed,
        )  # fmt: skip
        if failed.any():
            self._give_up(entries[failed > 0], into[failed > 0])

    def _give_up(self, entries: np.ndarray, into: np.ndarray) -> None:
        """Pages that could not be read: none is kept, and whoever needs them must fail."""
        self._hot[into] = 0
        pages = np.unique(entries // self.num_kv_heads)
        forget_pages(self._state, pages, self.num_kv_heads)
        self.unreadable.update(pages.tolist())
        self.counts.failed += len(entries)

    def _count(self, missing: int, pinned: int, evicted: int, seconds: float) -> None:
        counts = self.counts
        counts.hits += pinned - missing
        counts.misses += missing
        counts.evictions += evicted
        counts.bytes_read += missing * self._size
        counts.turns += 1
        counts.stall_s += seconds

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


def warm_up(kv_cache: torch.Tensor, store: ColdStore) -> None:
    """Compiles what a pool calls, on the first pages of a layer, before there is anything in them.

    Args:
        kv_cache: ``[pages, Hk, P, 2 * D]``, at least two pages.
        store: What it is in.
    """
    _, heads, page, _ = kv_cache.shape
    pool = HotPool(kv_cache[:2], store, 2 * heads)
    pool.forget(torch.tensor([0]))
    table = torch.arange(2 * heads, dtype=torch.int32).view(2, heads).T.contiguous()
    lengths = torch.full((heads,), 2 * page, dtype=torch.int32)
    for _ in pool.turns(table, lengths, Workspace()):
        pass


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
