"""A request's running query mean and variance on a GPU, carried on the pages that it fills.

The twin on CPU is :class:`kvplug.probe.query_statistics.QueryStatistics`. Where a window carries
from and to follows from lengths, so the host says it, in logical pages; a step of decoded tokens
that begin neither a window nor a window's last page launches nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvplug.attention.device.watchers import BoundLayer, DeviceWatcher
from kvplug.kernels.activation import Seen
from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.query_statistics import Carried, query_statistics

if TYPE_CHECKING:
    from kvplug.attention.device.plan import DevicePlan
    from kvplug.kernels.paged_attention import PagedCache


class DeviceQueryStatistics(DeviceWatcher):
    """Mean and variance of every query head's dimensions over the windows of a prompt.

    It is allocated for every page, of which a window uses two.
    """

    def __init__(self, layer: BoundLayer) -> None:
        """Allocates."""
        super().__init__(layer)
        size = self.shape.num_pages, self.shape.num_heads, self.shape.head_dim
        self.means = torch.zeros(size, device=layer.device)
        """``[pages, H, D]`` float32."""
        self.variances = torch.zeros(size, device=layer.device)
        """``[pages, H, D]`` float32, unbiased; 0 where there is one query only."""
        self.counts = torch.zeros(size[:2], device=layer.device)
        """``[pages, H]`` float32 queries seen."""

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See :attr:`DeviceState.state`."""
        return (self.means, self.variances, self.counts)

    def seen(self, block_table: torch.Tensor, request: torch.Tensor, before: torch.Tensor) -> Seen:
        """What windows find.

        Args:
            block_table: ``[B, max_pages]`` int32.
            request: ``[S]`` int32 row of the block table.
            before: ``[S]`` int32 logical page; negative at the start of a request.
        """
        return Seen(block_table, request, before, *self.state)

    def watch(
        self, queries: torch.Tensor, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan
    ) -> None:
        """See :meth:`DeviceWatcher.watch`."""
        assert plan.stream is not None
        windows = plan.stream.carried
        if not len(windows):
            return
        size = len(windows), self.shape.num_heads, 2, self.shape.head_dim
        query_statistics(
            QueryWindows(queries, windows.token_start, windows.num_tokens),
            self.seen(plan.block_table, windows.request, windows.before),
            Carried(windows.prefills, windows.here, windows.also),
            queries.new_empty(size, dtype=torch.float32),
        )
