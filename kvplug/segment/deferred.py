"""Prompt tokens of short contexts, whose surprise nobody needs yet.

Nothing is retrieved from a context of up to ``dense_below`` tokens, and most stay that short: so
their logits are not computed with their prompts. The hidden state before each token and the token
are kept, by physical page, until a request grows longer; then what its pages lack is measured and
cut into events, before anything is retrieved. Room is limited: pages that wait longest are
measured when it ends, and cut later. When a page is measured changes nothing that is found on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from kvplug.segment.prompts import Prompts
from kvplug.stage import Layer, Memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvplug.windows import Ints

    Measure = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    """Writes surprises ``[n]`` of tokens ``[n]`` by the hidden states before them."""

CONTEXTS = 4
"""Contexts of ``dense_below`` tokens that there is room for."""
NO_TOKEN = -1
"""Has no surprise."""


class DeferredTokens(Memory):
    """Tokens that wait, page by page; shared by all layers.

    A page is uncut from when its tokens are filed until its events are; until it is measured, it
    has a row too.
    """

    def __init__(self, layer: Layer) -> None:
        """Nothing waits."""
        super().__init__(layer)
        pages, page = layer.shape.num_pages, layer.shape.page
        rows = min(-(-CONTEXTS * layer.shape.dense_below // page), pages)
        self.uncut = np.zeros(pages, np.int32)
        """``[pages]`` prompt tokens of a page that are not cut into events."""
        self.num_uncut = np.zeros(1, np.int64)
        """Pages with such."""
        self._row = np.full(pages, -1, np.int32)
        self._page = np.full(rows, -1, np.int32)
        self._filed = np.zeros(rows, np.int64)
        self._clock = 0
        self._tokens = torch.zeros((rows, page), dtype=torch.int64)
        self._before: torch.Tensor | None = None

    def forget(self, slots: torch.Tensor) -> None:
        """See :meth:`Memory.forget`: a page handed to new content waits for nothing."""
        if self.num_uncut[0]:
            page = self.shape.page
            _forget(slots.numpy(), page, self.uncut, self.num_uncut, self._row, self._page)

    def add(
        self, prompts: Prompts, block_table: Ints, before: torch.Tensor, tokens: torch.Tensor,
        measure: Measure, surprise: torch.Tensor,
    ) -> None:  # fmt: skip
        """Files prompt windows.

        Args:
            prompts: The windows, ``T`` tokens.
            block_table: ``[B, max_pages]`` of the step.
            before: ``[T, hidden_size]`` the hidden state before each token.
            tokens: ``[T]`` token ids, NO_TOKEN where the state before is not known.
            measure: For pages that must make room.
            surprise: ``[pages, P]`` float32, written where they do.
        """
        page = self.shape.page
        slots = slots_of(prompts, block_table, page)
        pages = slots[np.flatnonzero(np.diff(slots // page, prepend=-1))] // page
        _count_uncut(slots, page, self.uncut, self.num_uncut)
        if len(pages) > len(self._page):
            found = torch.empty(len(tokens))
            measure(before, tokens, found)
            surprise.view(-1)[torch.from_numpy(slots)] = found
            return
        if self._before is None:
            self._before = before.new_zeros((*self._tokens.shape, before.shape[1]))
        self._give_rows(pages[self._row[pages] < 0], measure, surprise)
        places = torch.from_numpy(self._row[slots // page].astype(np.int64) * page + slots % page)
        self._before.flatten(0, 1)[places] = before
        self._tokens.view(-1)[places] = tokens.long()

    def _give_rows(self, pages: Ints, measure: Measure, surprise: torch.Tensor) -> None:
        """Gives pages empty rows; those that wait longest are measured until there is room."""
        used = np.flatnonzero(self._page >= 0)
        excess = len(pages) - (len(self._page) - len(used))
        if excess > 0:
            oldest = used[np.argsort(self._filed[used], kind="stable")[:excess]]
            self.measure(self._page[oldest], measure, surprise)
        rows = np.flatnonzero(self._page < 0)[: len(pages)].astype(np.int32)
        self._row[pages], self._page[rows] = rows, pages
        self._clock += 1
        self._filed[rows] = self._clock
        self._tokens[torch.from_numpy(rows).long()] = NO_TOKEN

    def measure(self, pages: Ints, measure: Measure, surprise: torch.Tensor) -> None:
        """Measures what waits on some pages, each listed once; they stay uncut.

        Args:
            pages: ``[n]`` physical pages; those that have no row are passed over.
            measure: What measures.
            surprise: ``[pages, P]`` float32, written.
        """
        rows = self._row[pages]
        pages, rows = pages[rows >= 0], rows[rows >= 0]
        if not len(pages):
            return
        assert self._before is not None
        index = torch.from_numpy(rows).long()
        found = torch.empty(len(rows) * self.shape.page)
        measure(self._before[index].flatten(0, 1), self._tokens[index].view(-1), found)
        surprise[torch.from_numpy(pages).long()] = found.view(len(rows), -1)
        self._row[pages], self._page[rows] = -1, -1

    def uncut_windows(self, block_table: Ints, before: Ints) -> Prompts | None:
        """The prompt windows of contexts that hold uncut pages, up to the last of these.

        Args:
            block_table: ``[B, max_pages]``.
            before: ``[B]`` tokens of a context that are looked through; 0 for none.
        """
        if not self.num_uncut[0]:
            return None
        shape = self.shape
        most = int(sum(-(-before.astype(np.int64) // shape.window)))
        columns = np.empty((3, most), np.int32)
        count = _uncut_windows(block_table, before, shape.page, shape.window, self.uncut, columns)
        if not count:
            return None
        request, first, tokens = columns[:, :count]
        offset = np.zeros(count + 1, np.int32)
        np.cumsum(tokens, out=offset[1:])
        return Prompts(request, first, tokens, offset, np.empty(0, np.int64))

    def cut(self, pages: Ints) -> None:
        """Events of these pages are filed."""
        self.num_uncut -= np.count_nonzero(self.uncut[pages])
        self.uncut[pages] = 0

    def nbytes(self) -> float:
        """See :meth:`Memory.nbytes`; the room is a buffer, whatever the cache's size."""
        return self.uncut.nbytes + self._row.nbytes


def slots_of(prompts: Prompts, block_table: Ints, page: int) -> np.ndarray:
    """``[T]`` int64 slots of the tokens of prompt windows."""
    shift = prompts.first.astype(np.int64) - prompts.offset[:-1]
    position = np.repeat(shift, prompts.tokens) + np.arange(prompts.offset[-1])
    owner = np.repeat(prompts.request, prompts.tokens)
    return block_table[owner, position // page].astype(np.int64) * page + position % page


@njit(cache=True)
def _forget(slots, page, uncut, num_uncut, row, page_of):  # type: ignore[no-untyped-def]
    """Frees every page whose first slot is written."""
    for token in range(slots.shape[0]):
        slot = slots[token]
        if slot < 0 or slot % page:
            continue
        mine = slot // page
        num_uncut[0] -= uncut[mine] > 0
        uncut[mine] = 0
        if row[mine] >= 0:
            page_of[row[mine]] = -1
            row[mine] = -1


@njit(cache=True)
def _count_uncut(slots, page, uncut, num_uncut):  # type: ignore[no-untyped-def]
    """``uncut[page]``: how far the filed tokens reach into the page."""
    for token in range(slots.shape[0]):
        mine, reach = slots[token] // page, slots[token] % page + 1
        num_uncut[0] += uncut[mine] == 0
        uncut[mine] = max(uncut[mine], reach)


@njit(cache=True)
def _uncut_windows(  # type: ignore[no-untyped-def]
    block_table, before, page, window, uncut, columns
):
    """Fills ``columns`` (request, first token, tokens) of the windows; returns their number."""
    count = 0
    for request in range(before.shape[0]):
        for first in range(0, before[request], window):
            end = first
            for start in range(first, min(first + window, before[request]), page):
                waiting = uncut[block_table[request, start // page]]
                end = start + waiting if waiting > 0 else end
            if end > first:
                columns[0, count], columns[1, count] = request, first
                columns[2, count] = end - first
                count += 1
    return count
