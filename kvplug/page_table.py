"""The rewritten page table: every (window, KV head) is a sequence with pages of its own.

The platform's dense paged kernel takes a batch of sequences. Here row ``s * Hk + h`` is window
``s`` seen by KV head ``h``: ``G`` query heads over the pages ``sinks | selected | local`` of a
single-head cache (:func:`kvplug.pages.single_head_view`). Dense windows ride along with all their
pages. Sinks and local pages are the same for every layer and are written once per step; a layer
only writes its selected pages.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numba import njit

if TYPE_CHECKING:
    from kvplug.pages import PageGeometry
    from kvplug.step import Step
    from kvplug.workspace import Workspace


class Rows(NamedTuple):
    """Sequences for the kernel: rows of a page table, in order, every KV head of each window."""

    pages: torch.Tensor
    """``[S * Hk, width]`` int32."""
    seq_lens: torch.Tensor
    """``[S * Hk]`` int32 tokens attended by the last query of each row."""
    query_start: torch.Tensor
    """``[S + 1]`` int32 first query token of each window, then the total; the first is 0."""
    is_decoding: bool
    """Whether every window is a single token: decoded, replayed or a draft's."""


class PageTable:
    """Page table and lengths of one step's ``S * Hk`` sequences.

    Args:
        step: The step's windows.
        geometry: Region sizes.
        num_kv_heads: Hk.
        workspace: Where the table lives.
    """

    def __init__(
        self, step: Step, geometry: PageGeometry, num_kv_heads: int, workspace: Workspace
    ) -> None:
        """Writes everything but the selected pages."""
        windows = step.windows
        rows = len(windows) * num_kv_heads
        self.num_kv_heads = num_kv_heads
        self.step = step
        self.table = workspace.take(
            "table.pages", (rows, geometry.max_pages_per_row()), torch.int32
        )
        """``[S * Hk, width]`` int32 pages of the single-head cache."""
        self.seq_lens = workspace.take("table.seq_lens", (rows,), torch.int32)
        """``[S * Hk]`` int32 tokens attended by the last query of each row."""
        self.query_start = torch.from_numpy(
            np.append(windows.token_start, windows.token_start[-1] + windows.num_tokens[-1])
        )
        """``[S + 1]`` int32 first query token of each window, then the total."""
        self.page = geometry.page
        self.host, self.seq_lens_host = self.table.numpy(), self.seq_lens.numpy()
        self._workspace = workspace
        _write_fixed_pages(
            windows.request, windows.context_end, windows.far_begin, windows.far_end,
            windows.num_selected, step.block_table_host, geometry.page, num_kv_heads,
            self.host, self.seq_lens_host,
        )  # fmt: skip

    @cached_property
    def slots(self) -> torch.Tensor:
        """``[S * Hk, width]`` int32: where a hot pool puts the slots of a layer's pages."""
        return self._workspace.take("table.slots", tuple(self.table.shape), torch.int32)

    @cached_property
    def slots_host(self) -> np.ndarray:
        """The same memory."""
        return self.slots.numpy()

    @cached_property
    def shares(self) -> np.ndarray:
        """``[S * Hk, width]`` float32 shares of attention, where pages give way by mass."""
        shape = tuple(self.table.shape)
        return self._workspace.take("table.shares", shape, torch.float32).fill_(1).numpy()

    def write_shares(
        self, scores: torch.Tensor, selected: torch.Tensor, counts: torch.Tensor
    ) -> None:
        """Writes one layer's shares: the softmax of scores for selected pages, 1 for all others.

        Args:
            scores: ``[W, Hk, N]`` logits, as :meth:`PageIndex.score` writes them.
            selected: See :meth:`write_selected`.
            counts: Likewise.
        """
        windows, step = self.step.windows, self.step
        _write_shares(
            scores.numpy(), selected.numpy(), counts.numpy(), step.sparse_windows,
            windows.far_begin, windows.far_end, self.shares,
        )  # fmt: skip

    def write_selected(self, selected: torch.Tensor, counts: torch.Tensor, varies: bool) -> None:
        """Writes one layer's selection.

        Args:
            selected: ``[W, Hk, K]`` int32 logical pages, as :meth:`Select.select` writes them.
            counts: ``[W, Hk]`` int32, how many of them each row has.
            varies: Whether ``counts`` differ from the budget that the rows were made for; local
                pages then move up behind the selected ones, and ``seq_lens`` follow.
        """
        windows, step = self.step.windows, self.step
        _write_selected_pages(
            selected.numpy(), counts.numpy(), step.sparse_windows, windows.request,
            windows.far_begin, step.block_table_host, self.host,
        )  # fmt: skip
        if varies:
            _write_local_pages(
                counts.numpy(), step.sparse_windows, windows.request, windows.context_end,
                windows.far_begin, windows.far_end, step.block_table_host, self.page,
                self.host, self.seq_lens_host,
            )  # fmt: skip

    def rows(
        self, first: int = 0, last: int | None = None, pages: torch.Tensor | None = None
    ) -> Rows:
        """The kernel's sequences for windows ``first`` to ``last``, the latter not included.

        Args:
            first: First window.
            last: The one behind the last; None for all.
            pages: ``[S * Hk, width]`` to read instead of the table.
        """
        starts = self.query_start[first : len(self.query_start) if last is None else last + 1]
        mine = slice(first * self.num_kv_heads, (first + len(starts) - 1) * self.num_kv_heads)
        starts = starts - starts[0] if first else starts
        return Rows(
            (self.table if pages is None else pages)[mine], self.seq_lens[mine], starts,
            len(starts) - 1 == int(starts[-1]),
        )  # fmt: skip


@njit(cache=True)
def _write_fixed_pages(  # type: ignore[no-untyped-def]
    request, context_end, far_begin, far_end, num_selected, block_table, page, num_kv_heads, table,
    seq_lens,
):  # fmt: skip
    """Sinks, local pages and whole dense rows; lengths."""
    for s in range(request.shape[0]):
        pages = block_table[request[s]]
        num_pages = (context_end[s] + page - 1) // page
        for head in range(num_kv_heads):
            row = s * num_kv_heads + head
            out = table[row]
            filled = 0
            for n in range(far_begin[s]):
                out[filled] = pages[n] * num_kv_heads + head
                filled += 1
            filled += num_selected[s]
            for n in range(far_end[s], num_pages):
                out[filled] = pages[n] * num_kv_heads + head
                filled += 1
            seq_lens[row] = filled * page - (num_pages * page - context_end[s])


@njit(cache=True)
def _write_selected_pages(  # type: ignore[no-untyped-def]
    selected, counts, rows, request, far_begin, block_table, table
):
    """Puts each window's selected pages behind its sinks."""
    num_kv_heads = selected.shape[1]
    for w in range(rows.shape[0]):
        row = rows[w]
        pages = block_table[request[row]]
        for head in range(num_kv_heads):
            out = table[row * num_kv_heads + head]
            for i in range(counts[w, head]):
                out[far_begin[row] + i] = pages[selected[w, head, i]] * num_kv_heads + head


@njit(cache=True)
def _write_shares(  # type: ignore[no-untyped-def]
    scores, selected, counts, rows, far_begin, far_end, shares
):
    """Shares of each sparse window's pages; scores that are no numbers have none."""
    num_kv_heads = selected.shape[1]
    for w in range(rows.shape[0]):
        row = rows[w]
        begin, pages = far_begin[row], far_end[row] - far_begin[row]
        for head in range(num_kv_heads):
            mine, out = scores[w, head], shares[row * num_kv_heads + head]
            most, total = -np.inf, 0.0
            for n in range(pages):
                most = max(most, mine[n]) if np.isfinite(mine[n]) else most
            for n in range(pages):
                total += np.exp(mine[n] - most) if np.isfinite(mine[n]) else 0.0
            out[:] = 1
            for i in range(counts[w, head]):
                score = mine[selected[w, head, i] - begin]
                out[begin + i] = np.exp(score - most) / total if np.isfinite(score) else 0.0


@njit(cache=True)
def _write_local_pages(  # type: ignore[no-untyped-def]
    counts, rows, request, context_end, far_begin, far_end, block_table, page, table, seq_lens
):
    """Puts each sparse window's local pages behind ``counts`` selected ones, and its length."""
    num_kv_heads = counts.shape[1]
    for w in range(rows.shape[0]):
        row = rows[w]
        pages = block_table[request[row]]
        num_pages = (context_end[row] + page - 1) // page
        for head in range(num_kv_heads):
            out = table[row * num_kv_heads + head]
            filled = far_begin[row] + counts[w, head]
            for n in range(far_end[row], num_pages):
                out[filled] = pages[n] * num_kv_heads + head
                filled += 1
            unused = num_pages * page - context_end[row]
            seq_lens[row * num_kv_heads + head] = filled * page - unused
