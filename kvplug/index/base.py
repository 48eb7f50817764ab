"""Contract of the index stage: a summary of keys by physical page, and page scores from it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import get_num_threads

from kvplug.stage import Layer, Memory, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvplug.page_reader import PageReader
    from kvplug.probe.base import Probes
    from kvplug.step import Step
    from kvplug.windows import Ints
    from kvplug.workspace import Workspace

PAGES_PER_READ = 64
"""Pages whose keys are unpacked at a time: 4 MiB with 4 heads of 32 tokens and 128 numbers."""

SCRATCH_PER_THREAD = 2**21
"""Bytes that a thread fills and reads before windows go on in turns: they stay in its caches."""


class Index(Stage):
    """Names a summary of keys, and makes one for each layer."""

    kind = "index"

    @abstractmethod
    def for_layer(self, layer: Layer) -> PageIndex:
        """The layer's summary, empty."""


class PageIndex(Memory):
    """Summary of one layer's keys. State belongs to physical pages and slots (design rule 1).

    Every page is sealed (:meth:`Memory.seal`) before it is scored.
    """

    @abstractmethod
    def score(self, probes: Probes, step: Step, scores: torch.Tensor) -> None:
        """Scores every far page of every sparse window, in one call. Higher is better.

        Args:
            probes: Of the step's ``W`` sparse windows.
            step: Windows and page numbers.
            scores: ``[W, Hk, N]`` float32, written: entry ``n`` is logical page
                ``far_begin + n``; entries from ``far_end - far_begin`` on are left alone.
        """

    @property
    def means(self) -> torch.Tensor:
        """``[pages, Hk, D]`` mean key of every page that any window may retrieve.

        Only where the stage gives ``means``.
        """
        raise NotImplementedError

    def bytes_per_token(self) -> float:
        """Bytes of index per token and layer, all KV heads."""
        return self.nbytes() / (self.shape.num_pages * self.shape.page)


def in_turns(windows: int, window_bytes: int) -> Iterator[slice]:
    """Windows in groups whose scratch fits the caches of the threads that fill and read it.

    Args:
        windows: How many.
        window_bytes: Scratch of each.

    Yields:
        Which of them, at least one at a time.
    """
    count = max(SCRATCH_PER_THREAD * get_num_threads() // max(window_bytes, 1), 1)
    for first in range(0, windows, count):
        yield slice(first, min(first + count, windows))


def read_pages(
    reader: PageReader, pages: Ints, num_kv_heads: int, workspace: Workspace
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Keys of whole pages, some at a time: a step can seal thousands.

    Args:
        reader: Of one layer.
        pages: ``[n]`` physical pages.
        num_kv_heads: Hk.
        workspace: Owns the keys, until the next ones are read.

    Yields:
        Which of ``pages``, and their keys, ``[m, Hk, A, B]`` float32 with the reader's A and B.
    """
    heads = np.arange(num_kv_heads)
    for first in range(0, len(pages), PAGES_PER_READ):
        part = slice(first, first + PAGES_PER_READ)
        rows = pages[part, None].astype(np.int64) * num_kv_heads + heads
        keys = reader.read(torch.from_numpy(rows.ravel()), workspace)
        yield part, keys.unflatten(0, (-1, num_kv_heads))
