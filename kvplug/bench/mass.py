"""Captured attention mass: how much of exact attention falls on the keys that a layer attends to.

Attention over everything is computed from the cache in float32, beside what the layer does, and
each key's weight is filed under its page. The sum over the pages in the layer's row of the page
table is what the layer captured; the largest sum that as many far pages could have captured is
what the best choice would have.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvplug.workspace import Workspace

if TYPE_CHECKING:
    from kvplug.page_reader import PageReader
    from kvplug.page_table import PageTable
    from kvplug.pipeline import Plan

READ_PAGES = 1024
"""Pages read at once: 16 MiB of float32 keys with 32 tokens of 128 numbers."""


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
        logical = table.step.block_table[int(windows.request[s])][: -(-context // page)]
        rows = logical.long() * heads + head
        row = s * heads + head
        filled = -(-int(table.seq_lens[row]) // page)
        attended = torch.isin(rows, table.table[row, :filled].long())
        far = torch.zeros_like(attended)
        far[int(windows.far_begin[s]) : int(windows.far_end[s])] = True
        return cls(rows, attended, far, context)


class MassMeter:
    """Measures one layer's windows; a layer's ``observer``.

    Args:
        reader: Reads the layer's keys.
        scale: Of the layer's logits.
        softcap: Cap of the layer's logits, 0 for none.
        since: Windows whose context ends before this token are not measured.
    """

    def __init__(self, reader: PageReader, scale: float, softcap: float, since: int) -> None:
        """Starts without measurements."""
        self.reader, self.scale, self.softcap, self.since = reader, scale, softcap, since
        self.measured: list[Mass] = []
        """One entry per window, of its last query."""
        self._workspace = Workspace()

    def __call__(self, queries: torch.Tensor, plan: Plan) -> None:
        """Measures the windows of one step.

        Args:
            queries: ``[T, H, D]`` of the step.
            plan: The step's, with the layer's pages selected.
        """
        assert plan.table is not None
        windows = plan.step.windows
        for s in range(len(windows)):
            if windows.context_end[s] >= self.since:
                last = int(windows.token_start[s] + windows.num_tokens[s]) - 1
                self.measured.append(self._window(queries[last].float(), plan.table, s))

    def _window(self, query: torch.Tensor, table: PageTable, s: int) -> Mass:
        """Measures one window by its last query, ``[H, D]``."""
        groups = query.view(table.num_kv_heads, -1, query.shape[-1])
        shares = [self.head(group, table, s, head) for head, group in enumerate(groups)]
        return Mass.mean(shares)

    def head(self, queries: torch.Tensor, table: PageTable, s: int, head: int) -> Mass:
        """Captured and best share of one KV head, means over its ``[G, D]`` queries."""
        pages = Pages.of(table, s, head)
        shares = self._page_shares(queries, pages).mean(0)
        best = shares[pages.far].topk(pages.chosen).values.sum() + shares[~pages.far].sum()
        return Mass(float(shares[pages.attended].sum()), float(best))

    def _page_shares(self, queries: torch.Tensor, pages: Pages) -> torch.Tensor:
        """``[G, N]`` float64 softmax mass of each page, of ``[G, D]`` float32 queries."""
        return self.logits(queries, pages).double().logsumexp(2).T.softmax(1)

    def logits(self, queries: torch.Tensor, pages: Pages) -> torch.Tensor:
        """``[N, G, P]`` float32 logits of ``[G, D]`` queries; -inf behind the context's end."""
        parts = []
        for block in pages.rows.split(READ_PAGES):
            keys = self.reader.read(block, self._workspace)
            logits = torch.matmul(queries, keys) * self.scale  # [n, G, P]
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            parts.append(logits)
        found = torch.cat(parts)
        count, _, page = found.shape
        found[-1, :, page - (count * page - pages.context) :] = -torch.inf
        return found
