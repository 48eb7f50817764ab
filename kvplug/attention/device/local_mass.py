"""Attention mass by slot on a GPU, and the pages that are settled by it.

The twins on CPU are :class:`kvplug.index.local_mass.LocalMass`, which watches every step, and the
memories that seal pages by it. Which windows have a query that counts follows from lengths, so most
steps that decode have none, and only forget.

On CPU the host seals pages, each once, when a window may first retrieve it. Here the host does not
know pages: before windows are scored, the device looks at all of their far pages, and settles those
that are not settled. That is after the step's windows gave their mass, and a settled page takes no
more, so neither chunks nor the batch nor who else has the page change what is kept of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvplug.attention.device.send import send
from kvplug.attention.device.watchers import DeviceSealer, DeviceState, DeviceWatcher
from kvplug.index.local_mass import EVERY
from kvplug.kernels.collect_mass import collect_mass, forget_mass
from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.local_mass import LocalWindows, local_mass
from kvplug.kernels.settled_pages import settle_pages
from kvplug.windows import Ints, Windows

if TYPE_CHECKING:
    from kvplug.attention.device.plan import DevicePlan
    from kvplug.attention.device.watchers import BoundLayer
    from kvplug.kernels.far_pages import FarPages
    from kvplug.kernels.paged_attention import PagedCache

SCRATCH = 64 * 2**20
"""Bytes of what windows give that a layer has at a time; more windows go in turns."""


class SampledWindows(DeviceState):
    """The windows of a step with a query that counts, found once for all layers.

    Args:
        layer: The first that asked; all have windows alike.
    """

    def __init__(self, layer: BoundLayer) -> None:
        """Knows no step."""
        super().__init__(layer)
        self.every = math.gcd(EVERY, self.shape.window)
        self.order = np.empty(0, np.int64)
        """``[W]`` their numbers in the stream, in the order of their first positions."""
        self.most_pages = 0
        """Local pages of the window that has most of them."""
        self.most_queries = 0
        """Queries that count of the window that has most of them."""
        self._plan: DevicePlan | None = None
        self._columns: tuple[torch.Tensor, ...] = ()

    def of(self, queries: torch.Tensor, plan: DevicePlan) -> LocalWindows | None:
        """The windows of a step, over a layer's queries; None without any.

        Args:
            queries: ``[T, H, D]``.
            plan: The step.
        """
        if self._plan is not plan:
            self._find(plan)
        if not len(self.order):
            return None
        start, count, request, end, page = self._columns
        return LocalWindows(
            QueryWindows(queries, start, count), plan.block_table, request, end, page
        )

    def _find(self, plan: DevicePlan) -> None:
        """Finds a step's windows."""
        stream = plan.stream
        assert stream is not None
        self._plan = plan
        self.order, counts = _sampled(stream.windows, self.every)
        ends, first_pages = (
            column[self.order] for column in (stream.windows.context_end, stream.windows.far_end)
        )
        pages = -(-ends // self.shape.page) - first_pages
        self.most_pages, self.most_queries = int(pages.max(initial=0)), int(counts.max(initial=0))
        if not len(self.order):
            return
        columns = (
            stream.token_start, stream.num_tokens, stream.request, stream.context_end,
            stream.far_end,
        )  # fmt: skip
        chosen = send(self.order, stream.request.device)
        self._columns = tuple(column.index_select(0, chosen) for column in columns)


def _sampled(windows: Windows, every: int) -> tuple[np.ndarray, Ints]:
    """Numbers of the windows with a query that counts, by first position, and how many they have.

    Requests that share a page must contribute in the order of their positions.
    """
    first = windows.context_end - windows.num_tokens
    counts = windows.context_end // every - first // every
    order = np.flatnonzero(counts)
    order = order[np.argsort(first[order], kind="stable")]
    return order, counts[order]


class DeviceLocalMass(DeviceWatcher, DeviceSealer):
    """Accumulated local attention of every slot, and what settled pages are known by.

    Args:
        layer: Whose.
    """

    def __init__(self, layer: BoundLayer) -> None:
        """Allocates."""
        super().__init__(layer)
        self._sampled, shape = layer.shared(SampledWindows), self.shape
        size = shape.num_pages, shape.num_kv_heads
        self._device = layer.device
        self.mass = torch.zeros((*size, shape.page), device=layer.device)
        self.seen = torch.zeros(size, dtype=torch.int32, device=layer.device)
        self._top = 1
        self._vectors: torch.Tensor | None = None
        self._largest: torch.Tensor | None = None

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """``[pages, Hk, P]`` float32 mass, ``[pages, Hk]`` int32 first position that may add.

        And the largest mass of settled pages, where it is kept.
        """
        return (self.mass, self.seen, *([] if self._largest is None else [self._largest]))

    def keep_representatives(self, top: int) -> torch.Tensor:
        """``[pages, Hk, D]`` bfloat16, of settled pages: mean of the ``top`` keys of most mass."""
        size = *self.seen.shape, self.shape.head_dim
        self._top = top
        self._vectors = torch.zeros(size, dtype=torch.bfloat16, device=self._device)
        return self._vectors

    def keep_largest(self) -> torch.Tensor:
        """``[pages, Hk]`` float32, of settled pages: the mass of the key that has most."""
        self._largest = torch.zeros(self.seen.shape, device=self._device)
        return self._largest

    def watch(
        self, queries: torch.Tensor, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan
    ) -> None:
        """See :meth:`DeviceWatcher.watch`."""
        forget_mass(plan.slots, self.mass, self.seen)
        windows = self._sampled.of(queries, plan)
        if windows is None:
            return
        heads, most_keys = self.seen.shape[1], self._sampled.most_pages * self.shape.page
        rows = self._sampled.most_queries * (self.shape.num_heads // heads)
        at_a_time = max(SCRATCH // max(heads * (most_keys + 2 * rows) * 4, 1), 1)
        for first in range(0, len(windows.request), at_a_time):
            part = windows.span(first, first + at_a_time)
            size = len(part.request), heads
            given = self.mass.new_empty((*size, most_keys))
            scratch = self.mass.new_empty((*size, 2, rows))
            options = self._sampled.every, self.shape.scale
            local_mass(part, cache.keys, *options, scratch, given)
            collect_mass(part, given, self.mass, self.seen)

    def seal(self, cache: PagedCache, far: FarPages, most_far: int) -> None:
        """See :meth:`DeviceSealer.seal`."""
        state = self.mass, self.seen
        settle_pages(
            cache.keys, far, most_far, *state, self._vectors, self._top, self._largest
        )  # fmt: skip
