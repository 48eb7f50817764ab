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

from kvplug.stage import LayerShape, Memory, Passage
from kvplug.step import Step
from kvplug.windows import cut_windows

if TYPE_CHECKING:
    from kvplug.pages import PageGeometry
    from kvplug.windows import Flags, Ints
    from kvplug.workspace import Workspace

CAPACITY = 128
"""Tokens that can wait."""


class PendingSteps:
    """Which tokens wait: their contexts and pages, the same for every layer.

    Args:
        geometry: Region sizes.
    """

    def __init__(self, geometry: PageGeometry) -> None:
        """Starts empty."""
        self.count = 0
        self._geometry = geometry
        self._ends = np.zeros(CAPACITY, np.int32)
        columns = -(-geometry.dense_below // geometry.page) + 1
        self._tables = torch.zeros((CAPACITY, columns), dtype=torch.int32)

    def can_wait(self, query_start: Ints, seq_lens: Ints, is_prefilling: Flags) -> bool:
        """Whether a step only decodes, below ``dense_below``: one token of each request."""
        requests = seq_lens.shape[0]
        return bool(
            query_start[-1] == requests <= CAPACITY
            and seq_lens.max() <= self._geometry.dense_below
            and not is_prefilling.any()
        )

    def has_room(self, seq_lens: Ints) -> bool:
        """Whether a step's tokens can join those that wait: none of them begins a page."""
        fits = self.count + seq_lens.shape[0] <= CAPACITY
        return bool(fits and (seq_lens % self._geometry.page != 1).all())

    def add(self, seq_lens: Ints, block_table: torch.Tensor) -> slice:
        """Notes a step whose tokens wait.

        Args:
            seq_lens: ``[B]`` context lengths, the tokens included.
            block_table: ``[B, max_pages]`` int32.

        Returns:
            Places of the tokens among those that wait.
        """
        first, stop = self.count, self.count + seq_lens.shape[0]
        self._ends[first:stop] = seq_lens
        columns = min(self._tables.shape[1], block_table.shape[1])
        self._tables[first:stop, :columns] = block_table[:, :columns]
        self.count = stop
        return slice(first, stop)

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
        watched: Whether memories watch, and so want queries too.
    """

    def __init__(self, shape: LayerShape, watched: bool) -> None:
        """Allocates room for CAPACITY tokens."""
        self._keys = torch.zeros((CAPACITY, shape.num_kv_heads, shape.head_dim))
        self._slots = torch.zeros(CAPACITY, dtype=torch.int64)
        rows = CAPACITY if watched else 0
        self._queries = torch.zeros((rows, shape.num_heads, shape.head_dim))

    def add_keys(self, places: slice, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Keeps keys and slots of tokens that :class:`PendingSteps` noted.

        Args:
            places: From :meth:`PendingSteps.add`.
            keys: ``[T, Hk, D]``; rows behind the step's tokens are padding.
            slots: ``[T]`` int64, the same.
        """
        count = places.stop - places.start
        self._keys[places] = keys[:count]
        self._slots[places] = slots[:count]

    def add_queries(self, places: slice, queries: torch.Tensor) -> None:
        """Keeps their queries ``[n, H, D]``."""
        self._queries[places] = queries

    def tell(
        self, step: Step, writers: list[Memory], watchers: list[Memory], workspace: Workspace
    ) -> None:
        """Tells memories of all waiting tokens, as their steps would have."""
        count = len(step.stream)
        keys = self._keys[:count]
        for memory in writers:
            memory.write(keys, self._slots[:count])
        passage = Passage(self._queries[:count], keys, step, workspace)
        for memory in watchers:
            memory.watch(passage)
