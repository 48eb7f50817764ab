"""Mean key and query of a request's first window on a GPU; the twin is :mod:`kvplug.index.centre`.

Which prompts begin in a step follows from lengths, so most steps take no mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvplug.attention.device.send import send
from kvplug.attention.device.watchers import DeviceState, DeviceWatcher
from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.mean_query import mean_query

if TYPE_CHECKING:
    from kvplug.attention.device.plan import DevicePlan
    from kvplug.attention.device.watchers import BoundLayer
    from kvplug.kernels.paged_attention import PagedCache


class FirstPages(DeviceState):
    """First pages of contexts, found once a step for all layers.

    Args:
        layer: The first that asked.
    """

    def __init__(self, layer: BoundLayer) -> None:
        """Knows no step."""
        super().__init__(layer)
        self.tokens = torch.empty(0, dtype=torch.int64)
        """``[T]`` int64, of each token's context."""
        self.begun: tuple[torch.Tensor, ...] | None = None
        """``[n]`` first query token and query tokens, int32, and first page, int64, of prompts that
        begin in the step; None without any."""
        self._plan: DevicePlan | None = None

    def find(self, plan: DevicePlan) -> None:
        """Finds those of a step."""
        if self._plan is plan:
            return
        stream = plan.stream
        assert stream is not None
        self._plan = plan
        firsts = plan.block_table[:, 0].long()
        counts, total = stream.num_tokens.long(), int(stream.windows.num_tokens.sum())
        rows = torch.repeat_interleave(stream.request.long(), counts, output_size=total)
        self.tokens, self.begun = firsts[rows], None
        begins = np.flatnonzero(stream.windows.context_end == stream.windows.num_tokens)
        if len(begins):
            chosen = send(begins, firsts.device)
            start, tokens, request = (
                column.index_select(0, chosen)
                for column in (stream.token_start, stream.num_tokens, stream.request)
            )
            self.begun = start, tokens, firsts[request.long()]


class DeviceCentre(DeviceWatcher):
    """Means of each request, on the page of its first token; other pages' rows are never touched.

    Args:
        layer: Whose.
    """

    def __init__(self, layer: BoundLayer) -> None:
        """Allocates a row per page."""
        super().__init__(layer)
        self.firsts, shape = layer.shared(FirstPages), self.shape
        size = shape.num_pages, shape.num_kv_heads, shape.head_dim
        self.keys = torch.zeros(size, device=layer.device)
        """``[pages, Hk, D]`` float32 mean keys."""
        size = shape.num_pages, shape.num_heads, shape.head_dim
        self.queries = torch.zeros(size, device=layer.device)
        """``[pages, H, D]`` float32 mean queries."""

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See the class."""
        return (self.keys, self.queries)

    def watch(
        self, queries: torch.Tensor, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan
    ) -> None:
        """Takes the means of every prompt that begins in this step."""
        self.firsts.find(plan)
        if self.firsts.begun is None:
            return
        start, tokens, pages = self.firsts.begun
        for vectors, means in ((keys, self.keys), (queries, self.queries)):
            num, heads = len(pages), vectors.shape[1]
            found = means.new_empty((num, heads, 1, vectors.shape[2]))
            counts = means.new_empty(num, dtype=torch.int32)
            mean_query(QueryWindows(vectors, start, tokens), found, counts)
            means.index_copy_(0, pages, found[:, :, 0])
