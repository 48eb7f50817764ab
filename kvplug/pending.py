"""Decoded tokens of short contexts, kept until something looks at what they would have changed.

While every request of a batch decodes below ``dense_below``, nothing is scored, so what memories
would learn of each token can wait: telling them of many tokens at once costs little more than of
one, and a dense step must cost no more than stock vLLM's. They are told before any step that is
not of that kind, and before a page is handed to new content, so the order of things stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from kvplug.stage import LayerShape, Passage
from kvplug.step import Step
from kvplug.windows import cut_windows

if TYPE_CHECKING:
    from kvplug.layer_stages import LayerStages
    from kvplug.pages import PageGeometry
    from kvplug.windows import Batch
    from kvplug.workspace import Workspace

CAPACITY = 128
"""Tokens that can wait."""


class PendingSteps:
    """Which tokens wait: their contexts, slots and pages, the same for every layer.

    Args:
        geometry: Region sizes.
    """

    def __init__(self, geometry: PageGeometry) -> None:
        """Starts empty."""
        self.count = 0
        self.slots = torch.zeros(CAPACITY, dtype=torch.int64)
        """``[CAPACITY]`` of the waiting tokens."""
        self._geometry = geometry
        self._ends = np.zeros(CAPACITY, np.int32)
        columns = -(-geometry.dense_below // geometry.page) + 1
        self._tables = torch.zeros((CAPACITY, columns), dtype=torch.int32)
        self._limits = (geometry.dense_below, geometry.page)
        self._host = (self._ends, self._tables.numpy(), self.slots.numpy())

    def add(self, batch: Batch) -> slice | None:
        """Notes a step whose tokens can wait.

        Returns:
            Places of its tokens among those that wait. None if the step does more than decode
            below ``dense_below``, or there is no room: then what waits must be told first.
        """
        first = self.count
        count = _note(*batch[:5], self._limits, first, *self._host)
        if count < 0:
            return None
        self.count = count
        return slice(first, count)

    def step(self) -> Step:
        """The waiting tokens as one step, each a request of its own with one window."""
        starts = np.arange(self.count + 1, dtype=np.int32)
        decoding = np.zeros(self.count, np.bool_)
        ends = self._ends[: self.count]
        stream = cut_windows(starts, ends, decoding, self._geometry, merge=False)
        return Step(stream, self._tables[: self.count], 0, stream, decoding)


class PendingTokens:
    """The waiting tokens of one layer.

    Args:
        shape: The layer's geometry.
    """

    def __init__(self, shape: LayerShape) -> None:
        """Allocates room for CAPACITY tokens."""
        self._keys = torch.zeros((CAPACITY, shape.num_kv_heads, shape.head_dim))
        self._queries = torch.zeros((CAPACITY, shape.num_heads, shape.head_dim))

    def add(self, places: slice, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Keeps queries and keys of tokens that :class:`PendingSteps` noted.

        Args:
            places: From :meth:`PendingSteps.add`.
            queries: ``[n, H, D]``.
            keys: ``[n, Hk, D]``.
        """
        self._queries[places].copy_(queries)
        self._keys[places].copy_(keys)

    def tell(
        self, step: Step, slots: torch.Tensor, layer: LayerStages, workspace: Workspace
    ) -> None:
        """Tells memories of all waiting tokens, as their steps would have.

        Args:
            step: From :meth:`PendingSteps.step`.
            slots: ``[n]`` of the tokens.
            layer: Whose memories.
            workspace: Where buffers live.
        """
        count = len(step.stream)
        passage = Passage(
            self._queries[:count], self._keys[:count], step, workspace, layer.fixed
        )  # fmt: skip
        layer.watch(passage, slots[:count])


@njit(cache=True)
def _note(  # type: ignore[no-untyped-def]
    query_start, seq_lens, is_prefilling, block_table, slot_mapping, limits, count, ends, tables,
    slots,
):  # fmt: skip
    """Appends a step's tokens; returns how many wait then, or -1 where nothing was appended.

    A token that begins a page hands it to new content, so it must not wait behind others.
    """
    dense_below, page = limits
    requests = seq_lens.shape[0]
    if query_start[requests] != requests or count + requests > ends.shape[0]:
        return -1
    for request in range(requests):
        end = seq_lens[request]
        if is_prefilling[request] or end > dense_below or (count > 0 and (end - 1) % page == 0):
            return -1
    columns = min(tables.shape[1], block_table.shape[1])
    for request in range(requests):
        ends[count] = seq_lens[request]
        slots[count] = slot_mapping[request]
        tables[count, :columns] = block_table[request, :columns]
        count += 1
    return count
