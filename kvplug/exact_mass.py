"""Exact attention of single queries, page by page, from the cache and beside what a layer does."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvplug.workspace import Workspace

if TYPE_CHECKING:
    from kvplug.page_reader import PageReader
    from kvplug.page_table import PageTable

READ_PAGES = 128
"""Pages read at once: 2 MiB of float32 keys with 32 tokens of 128 numbers."""


class Mass(NamedTuple):
    """Shares of exact attention, each the mean over a window's query heads."""

    captured: float
    """On the pages that were attended."""
    best: float
    """On sinks, local pages and the best far pages, as many per KV head as were attended."""

    @classmethod
    def mean(cls, many: Iterable[Mass]) -> Mass:
        """The mean of each."""
        return cls(*(statistics.fmean(values) for values in zip(*many, strict=True)))


class Pages(NamedTuple):
    """The pages of one window's context, ``N`` of them, as one KV head sees them."""

    rows: torch.Tensor
    """``[N]`` int64 pages of the single-head cache, in the context's order."""
    attended: torch.Tensor
    """``[N]`` whether the window attends to them."""
    far: torch.Tensor
    """``[N]`` whether they are neither sinks nor local."""
    context: int
    """Tokens of context; the last page may hold more."""

    @property
    def chosen(self) -> int:
        """How many far pages are attended."""
        return int((self.attended & self.far).sum())

    @classmethod
    def of(cls, table: PageTable, s: int, head: int) -> Pages:
        """Those of window ``s``."""
        windows, heads, page = table.step.windows, table.num_kv_heads, table.page
        context = int(windows.context_end[s])
        rows = table.step.pages_of(s, page) * heads + head
        row = s * heads + head
        filled = -(-int(table.seq_lens[row]) // page)
        attended = torch.isin(rows, table.table[row, :filled].long())
        far = torch.zeros_like(attended)
        far[int(windows.far_begin[s]) : int(windows.far_end[s])] = True
        return cls(rows, attended, far, context)


class ExactAttention:
    """Exact attention of single queries to one layer's cache, page by page.

    Args:
        reader: Reads the layer's keys.
        scale: Of the layer's logits.
        softcap: Cap of the layer's logits, 0 for none.
    """

    def __init__(self, reader: PageReader, scale: float, softcap: float) -> None:
        """Holds its arguments."""
        self.reader, self.scale, self.softcap = reader, scale, softcap
        self._workspace = Workspace()

    def shares(self, queries: torch.Tensor, rows: torch.Tensor, context: int) -> torch.Tensor:
        """Softmax mass of each page.

        Args:
            queries: ``[G, D]`` float32.
            rows: ``[N]`` int64 pages of the single-head cache, in the context's order.
            context: Tokens of context; the last page may hold more.

        Returns:
            ``[G, N]`` float64.
        """
        return self.logits(queries, rows, context).double().logsumexp(2).T.softmax(1)

    def logits(self, queries: torch.Tensor, rows: torch.Tensor, context: int) -> torch.Tensor:
        """``[N, G, P]`` float32 logits, of the same arguments; -inf behind the context's end."""
        parts = []
        for block in rows.split(READ_PAGES):
            keys = self.reader.read(block, self._workspace)
            logits = torch.matmul(queries, keys) * self.scale  # [n, G, P]
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            parts.append(logits)
        found = torch.cat(parts)
        count, _, page = found.shape
        found[-1, :, page - (count * page - context) :] = -torch.inf
        return found
