"""Means of pages and of chunks of pages on a GPU; the twin is :mod:`kvplug.index.chunk_mean`.

On CPU a page is summarised when it leaves the local region, and a chunk with its last page. Here a
page is summarised when its last slot is written, and a chunk in the same step, from the means of
its pages: they come before, in the context or in the step, so all are there. What is stored of a
chunk that a window may look into is the same; a chunk that begins at a sink has a mean too, which
nobody asks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from kvplug.attention.device.memory import DeviceMemory
from kvplug.kernels.chunk_means import chunk_means
from kvplug.kernels.chunk_scores import ChunkScratch, Looks, chunk_scores
from kvplug.kernels.page_statistics import filled_page_statistics

if TYPE_CHECKING:
    from kvplug.attention.device.plan import DevicePlan, SparseWindows
    from kvplug.index.chunk_mean import ChunkMean
    from kvplug.kernels.far_pages import FarPages
    from kvplug.kernels.paged_attention import PagedCache
    from kvplug.stage import LayerShape


class ChunkMemory(DeviceMemory):
    """Mean keys of whole pages, and at chunks' last pages those of chunks.

    Args:
        options: The index.
        shape: The layer's geometry.
        device: Where.
    """

    def __init__(self, options: ChunkMean, shape: LayerShape, device: torch.device) -> None:
        """Allocates."""
        size = shape.num_pages, shape.num_kv_heads, shape.head_dim
        self.options, self.scale, self.chunk_pages = options, shape.scale, options.pages
        self.means = torch.zeros(size, dtype=torch.bfloat16, device=device)
        self.chunks = torch.zeros(size, dtype=torch.bfloat16, device=device)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """``[pages, Hk, D]`` bfloat16 means of pages, and of the chunks that end with them."""
        return (self.means, self.chunks)

    def write(self, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan) -> None:
        """See :meth:`DeviceMemory.write`."""
        filled_page_statistics(cache.keys, plan.slots, means=self.means)
        if plan.chunks is not None:
            chunk_means(self.means, plan.block_table, plan.chunks, self.chunk_pages, self.chunks)

    def score(
        self, vectors: torch.Tensor, counts: torch.Tensor, windows: SparseWindows, far: FarPages,
        scores: torch.Tensor,
    ) -> None:  # fmt: skip
        """See :meth:`DeviceMemory.score`."""
        options, pages = self.options, scores.shape[2]
        wanted = math.ceil(min(options.spread * windows.budget / options.pages, pages))
        agree, add = options.heads == "all", options.reduce == "sum"
        looks = Looks(options.pages, max(wanted, 1), agree, add)
        size = (*scores.shape[:2], pages // options.pages)
        scratch = ChunkScratch(scores.new_empty(size), scores.new_empty(size, dtype=torch.uint8))
        chunk_scores(
            self.means, self.chunks, vectors, counts, far, self.scale, looks, scratch, scores
        )

    def scratch_bytes(self, probes: int, pages: int) -> int:
        """See :meth:`DeviceMemory.scratch_bytes`."""
        return 4 * pages + 5 * (pages // self.chunk_pages)
