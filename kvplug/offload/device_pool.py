"""The hot pool of a GPU: a layer's pages that attention reads, in front of pinned host memory.

The twin on CPU is :mod:`kvplug.offload.hot_pool`. A slot holds one page of one KV head. Which pages
a step asks for only the device knows, so all of it is done there, by kernels, and nobody waits: the
host says how many may be listed at most, and counts come to it when they come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvplug.errors import KvplugError
from kvplug.kernels.find_slots import find_slots
from kvplug.kernels.gather_pages import gather_pages
from kvplug.kernels.keep_slots import keep_slots
from kvplug.kernels.list_missing import list_missing
from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.paged_attention import PagedCache
from kvplug.kernels.slot_maps import SlotMaps
from kvplug.kernels.slot_rows import slot_rows
from kvplug.kernels.take_slots import take_slots
from kvplug.kernels.write_slots import write_slots
from kvplug.offload.told_counts import ToldCounts

if TYPE_CHECKING:
    from kvplug.offload.counts import PoolCounts
    from kvplug.offload.host_store import HostStore

MOST_ENTRIES = 2**31
"""Pages of single KV heads that int32 can number."""


class DevicePool:
    """One layer's slots.

    Args:
        kv_cache: ``[pages, Hk, P, 2 * D]`` of the layer, in the cold store, in any of vLLM's
            layouts.
        store: The store.
        slots: Pages of single KV heads that the pool holds.
        told: What all layers count.
        rank: Of the layer among those.

    Raises:
        KvplugError: The cold store has more pages than the pool can number.
    """

    links = None
    """There are no events on a GPU."""

    def __init__(
        self, kv_cache: torch.Tensor, store: HostStore, slots: int, told: ToldCounts, rank: int
    ) -> None:
        """Allocates the slots on the cache's device."""
        pages, heads, page, width = kv_cache.shape
        if pages * heads >= MOST_ENTRIES:
            raise KvplugError(
                f"kvplug option offload.cold_gib makes {pages * heads} pages of KV heads, more "
                f"than the hot pool can number: ask for less."
            )
        dim = width // 2
        self.store, self.page, self.rank = store, page, rank
        self.pages = kv_cache.new_zeros((slots, 2, page, dim))
        """``[slots, 2, P, D]`` keys and values."""
        keys, values = (side[:, :, None].expand(-1, -1, heads, -1) for side in self.pages.unbind(1))
        self.cache = PagedCache(keys, values)
        """The slots as a cache in which a page is the same for all heads."""
        self._cold = kv_cache.unflatten(-1, (2, dim)).permute(0, 3, 2, 1, 4)
        self._token_bytes = heads * width * kv_cache.dtype.itemsize
        self._told = told
        self._maps = SlotMaps.empty(pages, heads, slots, told.total[rank])

    def write(self, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> None:
        """Lets the pool's copies of pages follow what a step writes, before anything is placed.

        Args:
            keys: ``[T, Hk, D]`` of the step, which are in the cold store.
            values: ``[T, Hk, D]`` likewise.
            places: ``[T]`` int64 where, ``page * P + offset``; negative ones are padding.
        """
        write_slots(keys, values, places, self._maps, self.pages)

    def count(self, tokens: int, turns: int) -> None:
        """Counts what the host knows of a step, for a graph is replayed without it.

        Args:
            tokens: That it writes.
            turns: In which it is attended.
        """
        self._told.turns[self.rank] += turns
        self._told.written[self.rank] += tokens * self._token_bytes

    def place(self, rows: PageRows, most: int, rest: PageRows | None = None) -> PageRows:
        """Brings in the pages of rows.

        Args:
            rows: Of whole windows, of physical pages.
            most: Different pages of single KV heads that they list at most; no more than slots.
            rest: Rows that the step places later, whose pages give way last.

        Returns:
            Rows of slots, for :attr:`cache`; they hold until others are placed.
        """
        entries, missing = (
            rows.table.new_empty(size) for size in ((most, 3), (1,))
        )  # fmt: skip
        if rest is not None:
            keep_slots(rest, self.page, self._maps)
        find_slots(rows, self.page, self._maps)
        list_missing(rows, self.page, self._maps, entries, missing)
        take_slots(entries, missing, self._maps)
        gather_pages(self._cold, entries, missing, self.pages)
        slots = torch.empty_like(rows.table)
        slot_rows(rows, self.page, self._maps, slots)
        return rows._replace(table=slots)

    def tell(self) -> None:
        """Sends counts on their way, where this is the last layer of a step."""
        if self.rank == len(self._told.turns) - 1:
            self._told.send()

    def take_unreadable(self) -> set[int]:
        """None: what lies in memory can be read."""
        return set()

    @property
    def counts(self) -> PoolCounts:
        """What has come."""
        return self._told.of(self.rank)

    def check_integrity(self) -> bool:
        """Whether maps agree and every held page is the cold store's to the bit; waits for both.

        Raises:
            AssertionError: They do not.
        """
        slot_of, entry_in = self._maps.slot_of.flatten(), self._maps.entry_in
        held = (entry_in >= 0).nonzero().flatten()
        entries = entry_in[held].long()
        assert torch.equal(slot_of[entries].long(), held)
        assert int((slot_of >= 0).sum()) == len(held)
        assert int(slot_of.min()) >= -1
        heads = self._cold.shape[3]
        cold = self._cold[entries // heads, :, :, entries % heads].contiguous()
        assert torch.equal(self.pages[held].view(torch.int16), cold.view(torch.int16))
        return True

    def nbytes(self) -> int:
        """Bytes of slots and maps."""
        return self.pages.nbytes + sum(tensor.nbytes for tensor in self._maps)
