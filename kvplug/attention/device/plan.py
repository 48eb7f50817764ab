"""One step on a GPU: its windows cut on the host from lengths, and sent to the device in one copy.

The host knows lengths, and never sees pages: block tables and slots stay where vLLM's model runner
makes them, and nothing here waits for the device. Windows that attend to everything are vLLM's
own; of the others, those of one token come first, for their attention is cut into parts. Where a
recipe has something that watches, the same copy brings it all windows (:mod:`.stream`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kvplug.attention.device.send import send_columns
from kvplug.attention.device.stream import HostStream, StreamWindows
from kvplug.kernels.chunk_means import ChunkEnds
from kvplug.kernels.far_pages import FarPages
from kvplug.kernels.page_rows import Contexts
from kvplug.pages import PageGeometry
from kvplug.windows import Flags, Ints, Windows, cut_windows

if TYPE_CHECKING:
    from kvplug.attention.device.turns import Turn


class Lengths(NamedTuple):
    """A batch as the host knows it."""

    query_start: Ints
    """``[B + 1]`` first query token of each request, then the total."""
    seq_lens: Ints
    """``[B]`` context lengths, this step's tokens included."""
    is_prefilling: Flags
    """``[B]`` whether the prompt was incomplete before this step."""


class SparseWindows(NamedTuple):
    """The ``S`` windows that select pages, those of one token first; columns are on the device."""

    singles: int
    """How many have one token."""
    most_far: int
    """Room for the far pages of the window that has most of them: see :func:`room_for`."""
    budget: int
    """Far pages that a window selects, where the recipe's budget is fixed."""
    tokens: torch.Tensor
    """``[Ts]`` int32 places in the step of the tokens of the step's other windows."""
    query_start: torch.Tensor
    """``[n + 1]`` int32 first of these tokens of each such window, then Ts."""
    request: torch.Tensor
    """``[S]`` int32 row of the block table."""
    token_start: torch.Tensor
    """``[S]`` int32 first query token."""
    num_tokens: torch.Tensor
    """``[S]`` int32 query tokens."""
    context_end: torch.Tensor
    """``[S]`` int32 tokens of context, the window's own included."""
    far_begin: torch.Tensor
    """``[S]`` int32 first far page."""
    far_end: torch.Tensor
    """``[S]`` int32 page after the last far one."""
    before: torch.Tensor | None = None
    """``[S]`` int32 logical page with what the request carried to the window, negative at its
    start (:mod:`kvplug.carry`); None where nobody watches."""
    prefills: torch.Tensor | None = None
    """``[S]`` int32, 1 for a window of a prompt, 0 for a decoded token; None likewise."""

    def __len__(self) -> int:
        """S."""
        return len(self.request)

    def span(self, first: int, last: int) -> SparseWindows:
        """Windows ``first`` to ``last``, the latter not included."""
        columns = (None if column is None else column[first:last] for column in self[5:])
        singles = min(max(self.singles - first, 0), last - first)
        return SparseWindows(singles, *self[1:5], *columns)

    def contexts(self, block_table: torch.Tensor, page: int) -> Contexts:
        """Where the regions of the windows' contexts lie.

        Args:
            block_table: ``[B, max_pages]`` int32 on the device.
            page: P.
        """
        far = FarPages(block_table, self.request, self.far_begin, self.far_end)
        return Contexts(far, self.context_end, page)


class DenseRows(NamedTuple):
    """What attends to everything beside sparse windows: ``n`` runs of tokens, one a request."""

    tokens: torch.Tensor
    """``[Td]`` int32 places of their tokens in the step, run by run."""
    request: torch.Tensor
    """``[n]`` int32 row of the block table."""
    query_start: torch.Tensor
    """``[n + 1]`` int32 first of the runs' tokens, then Td."""
    seq_lens: torch.Tensor
    """``[n]`` int32 tokens of context."""
    longest: int
    """Tokens of the longest run."""
    longest_context: int
    """Tokens of the longest context."""


class DevicePlan(NamedTuple):
    """What every layer of a step shares."""

    block_table: torch.Tensor
    """``[B, max_pages]`` int32 on the device."""
    slots: torch.Tensor
    """``[T]`` int64 on the device; negative ones are padding."""
    windows: Windows
    """On the host, all of them."""
    firsts: torch.Tensor
    """``[T]`` int32 first page of each token's context, or -1 for one of the context's first."""
    begun: torch.Tensor
    """``[m]`` int32 rows whose contexts have all of their first tokens for the first time."""
    sparse: SparseWindows | None
    """None: every window attends to everything."""
    dense: DenseRows | None
    """None: no window does, beside sparse ones."""
    stream: StreamWindows | None = None
    """All windows, for what watches; None where nothing does."""
    chunks: ChunkEnds | None = None
    """Chunks that the step completes, for an index that has chunks."""
    turns: Sequence[Turn] = ()
    """Sparse windows that are attended together, where there is a hot pool."""


def make_plan(
    lengths: Lengths, block_table: torch.Tensor, slots: torch.Tensor, geometry: PageGeometry,
    first_tokens: int, *, watched: bool = False,
) -> DevicePlan:  # fmt: skip
    """Plans a step.

    Args:
        lengths: Of the batch, on the host.
        block_table: ``[B, max_pages]`` int32 on the device.
        slots: ``[T]`` int64 on the device, or more.
        geometry: Region sizes.
        first_tokens: Tokens at a context's start that are learnt from when all are there.
        watched: Whether to bring the stream.
    """
    windows = cut_windows(*lengths, geometry)
    order = singles_first(windows)
    singles = int((windows.num_tokens[order] == 1).sum())
    dense = np.flatnonzero(~windows.sparse)[: None if len(order) else 0].astype(np.int32)
    stream = _stream(lengths, geometry, order) if watched else None
    of_tokens, of_dense, of_sparse, of_stream = _send(
        block_table.device,
        find_first_tokens(lengths, first_tokens),
        (*_tokens(windows, dense), windows.request[dense], windows.context_end[dense]),
        (
            *_tokens(windows, order[singles:]), *(column[order] for column in windows[:6]),
            *(() if stream is None else stream.of_sparse),
        ),
        () if stream is None else stream.columns,
    )  # fmt: skip
    sparse = dense_rows = None
    if len(order):
        most_far = room_for(int((windows.far_end - windows.far_begin)[order].max()))
        sparse = SparseWindows(singles, most_far, geometry.budget_pages, *of_sparse)
    if len(dense):
        tokens, query_start, request, seq_lens = of_dense
        longest = int(windows.num_tokens[dense].max()), int(windows.context_end[dense].max())
        dense_rows = DenseRows(tokens, request, query_start, seq_lens, *longest)
    slots = slots[: int(lengths.query_start[-1])]
    rows, begun = of_tokens
    firsts = first_pages_of(rows, block_table)
    sent = None if stream is None else stream.on_device(of_stream)
    return DevicePlan(block_table, slots, windows, firsts, begun, sparse, dense_rows, sent)


def _stream(lengths: Lengths, geometry: PageGeometry, order: Ints) -> HostStream:
    """The step's stream, whose sparse windows in order are the sorted ``order``."""
    windows = cut_windows(*lengths, geometry, merge=False)
    sizes = geometry.window, geometry.page
    return HostStream.of(windows, lengths.is_prefilling, np.argsort(order), *sizes)


def room_for(pages: int) -> int:
    """A multiple of 16 that is at least ``pages``.

    Triton compiles a program of its own for sizes that are not, and another one for 1: they would
    go on being compiled while contexts grow.
    """
    return max(-(-pages // 16), 1) * 16


def first_pages_of(rows: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """See :attr:`DevicePlan.firsts`.

    Args:
        rows: ``[T]`` int32 rows of the block table, negative for a context's first tokens.
        block_table: ``[B, max_pages]`` int32.
    """
    return torch.where(rows < 0, -1, block_table[:, 0].index_select(0, rows.clamp(min=0)))


def find_first_tokens(lengths: Lengths, first_tokens: int) -> tuple[Ints, Ints]:
    """Each token's row of the block table, or -1 for one of its context's first; and ``begun``.

    Args:
        lengths: Of the batch.
        first_tokens: Tokens at a context's start that are learnt from when all are there.
    """
    counts = np.diff(lengths.query_start)
    before = lengths.seq_lens - counts
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    positions = np.arange(len(rows)) - np.repeat(lengths.query_start[:-1] - before, counts)
    has_begun = (before < first_tokens) & (lengths.seq_lens >= first_tokens)
    rows[positions < first_tokens] = -1
    return rows, np.flatnonzero(has_begun).astype(np.int32)


def _tokens(windows: Windows, rows: Ints) -> tuple[Ints, Ints]:
    """Places of the tokens of some windows, window by window, and where each window's begin."""
    counts = windows.num_tokens[rows]
    starts = np.cumsum([0, *counts], dtype=np.int32)
    shift = np.repeat(windows.token_start[rows] - starts[:-1], counts)
    return np.arange(starts[-1], dtype=np.int32) + shift, starts


def singles_first(windows: Windows) -> Ints:
    """Numbers of the sparse windows, in order but for those of one token, which come first."""
    rows = np.flatnonzero(windows.sparse).astype(np.int32)
    return rows[np.argsort(windows.num_tokens[rows] > 1, kind="stable")]


def _send(device: torch.device, *groups: tuple[Ints, ...]) -> list[tuple[torch.Tensor, ...]]:
    """Groups of columns as int32 on the device, by one copy that nobody waits for."""
    sent = iter(send_columns([column for group in groups for column in group], device))
    return [tuple(itertools.islice(sent, len(group))) for group in groups]
