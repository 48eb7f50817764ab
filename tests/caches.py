"""Caches of keys for tests of what summarises pages when they are sealed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvplug.index.sealing import Seals
from kvplug.page_reader import PageReader
from kvplug.stage import LayerShape, Memory
from kvplug.step import Sealing, Step
from kvplug.workspace import Workspace
from tests.made_up import reader_of
from tests.steps import Far, step_of


class KeyCache:
    """Keys of one layer, by page as vLLM's ``vec`` kernel packs them.

    Args:
        shape: The layer's geometry.
    """

    def __init__(self, shape: LayerShape) -> None:
        self.page = shape.page
        self.packed = torch.zeros(shape.num_pages, shape.num_kv_heads, shape.head_dim, shape.page)
        self.seals = Seals(shape.num_pages)
        self.workspace = Workspace()

    def reader(self) -> PageReader:
        """Reads ``[n, D, P]``."""
        pages, heads, dim, page = self.packed.shape
        return reader_of(self.packed.view(pages * heads, 1, page, dim))

    def write(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Keys ``[T, Hk, D]`` enter the cache."""
        self.packed[slots // self.page, :, :, slots % self.page] = keys
        self.seals.reset(slots.numpy(), self.page)

    def seal(self, step: Step, *memories: Memory) -> None:
        """The step's windows seal what they leave behind."""
        sealed = self.seals.seal(step, self.workspace)
        for memory in memories if len(sealed.begun) else ():
            memory.begin(sealed, step, self.workspace)
        for memory in memories if len(sealed.pages) else ():
            memory.seal(sealed, step, self.workspace)


def fill(index: Any, keys: torch.Tensor, pages: torch.Tensor) -> None:
    """One request's whole pages are sealed.

    Args:
        index: Reads rows of keys.
        keys: ``[n * P, Hk, D]``.
        pages: ``[n]`` where they lie; the request has them in this order.
    """
    cache = KeyCache(index.shape)
    slots = pages.long()[:, None] * cache.page + torch.arange(cache.page)
    cache.write(keys, slots.flatten())
    index._reader = cache.reader().transposed()
    count, physical = len(pages), pages.to(torch.int32)
    ascending = np.arange(count, dtype=np.int32)
    starts, begun = np.array([0, count], np.int32), np.zeros(1, np.int32)
    sealed = Sealing(physical.numpy(), ascending, starts, begun)
    step = step_of([Far(0, 0, count)], physical[None].contiguous())
    index.begin(sealed, step, cache.workspace)
    index.seal(sealed, step, cache.workspace)
