"""One engine step as windows: which query tokens share a selection, and what they may attend to.

A window is a run of query tokens of one request that shares one selection of far pages. Prefill is
cut at absolute multiples of the window size, so a request has the same windows whatever the
scheduler's chunks; every other token (decoded, drafted, or replayed after preemption) is a window
of its own, as it was when it was first computed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvplug.pages import PageGeometry
from kvplug.row_counts import RowCounts

Ints = NDArray[np.int32]
Flags = NDArray[np.bool_]

EVERYTHING = 2**30
"""A budget that no context exceeds: every window with it is dense."""


class Asked(NamedTuple):
    """What the requests of a batch ask for themselves."""

    budgets: Ints
    """``[B]`` far pages of each request's windows, the engine's included; EVERYTHING for a dense
    one."""
    targets: NDArray[np.float64]
    """``[B]`` recall targets, NaN for the engine's."""


class Batch(NamedTuple):
    """One step's batch, as arrays over vLLM's memory."""

    query_start: Ints
    """``[B + 1]`` first query token of each request, then the total."""
    seq_lens: Ints
    """``[B]`` context lengths, this step's tokens included."""
    is_prefilling: Flags
    """``[B]`` whether the prompt was incomplete before this step."""
    block_table: Ints
    """``[B, max_pages]`` physical pages."""
    slots: NDArray[np.int64]
    """``[T]`` where the step's keys go; more rows are padding."""
    asked: Asked | None = None
    """None: no request asks for anything."""
    counts: RowCounts | None = None
    """Takes what each request attended to; None: none wants to know."""


class Windows(NamedTuple):
    """The ``S`` windows of one step, in the order of their tokens; they cover every token once.

    Adjacent dense windows of a request are one entry, which attends causally just as they would;
    but none has windows on both sides of ``dense_below``.
    """

    request: Ints
    """``[S]`` row of the batch that the window belongs to."""
    token_start: Ints
    """``[S]`` first query token, as an index into the step's tokens."""
    num_tokens: Ints
    """``[S]`` query tokens."""
    context_end: Ints
    """``[S]`` tokens of context, the window's own included."""
    far_begin: Ints
    """``[S]`` first retrievable page of the context (the first after the sinks)."""
    far_end: Ints
    """``[S]`` page after the last retrievable one (the first local page of the first query)."""
    num_selected: Ints
    """``[S]`` far pages to select, where the recipe's budget is fixed; 0 in a dense window."""
    sparse: Flags
    """``[S]`` whether the window attends to selected pages instead of everything."""

    def __len__(self) -> int:
        """S."""
        return self.request.shape[0]


def cut_windows(
    query_start: Ints,
    seq_lens: Ints,
    is_prefilling: Flags,
    geometry: PageGeometry,
    *,
    merge: bool = True,
    budgets: Ints | None = None,
) -> Windows:
    """Cuts one step's batch into windows.

    Args:
        query_start: ``[B + 1]`` first query token of each request, then the total.
        seq_lens: ``[B]`` context length of each request after this step's tokens.
        is_prefilling: ``[B]`` whether the request's prompt was not complete before this step.
        geometry: Region sizes.
        merge: Join adjacent dense windows of a request, and give dense ones no far pages. Without,
            every window has an entry and the far pages that its place in the request gives it.
        budgets: ``[B]`` far pages of each request's windows; None: the geometry's for all.
    """
    if budgets is None:
        budgets = np.full(seq_lens.shape[0], geometry.budget_pages, dtype=np.int32)
    capacity = int(query_start[-1])
    columns = np.empty((7, capacity), dtype=np.int32)
    sparse = np.empty(capacity, dtype=np.bool_)
    batch = (query_start, seq_lens, is_prefilling, budgets)
    count = _cut(*batch, geometry, merge, columns, sparse)
    request, start, tokens, end, far_begin, far_end, selected = columns[:, :count]
    return Windows(request, start, tokens, end, far_begin, far_end, selected, sparse[:count])


@njit(cache=True)
def _cut(  # type: ignore[no-untyped-def]
    query_start, seq_lens, is_prefilling, budgets, geometry, merge, columns, sparse
):
    """Fills ``columns`` (the fields of Windows, in order) and ``sparse``; returns S."""
    page, window, sink_pages, local, _, dense_below, _ = geometry
    count = 0
    for request in range(seq_lens.shape[0]):
        start, stop = query_start[request], query_start[request + 1]
        context_before = seq_lens[request] - (stop - start)
        budget_pages = budgets[request]
        mergeable = False
        token = start
        while token < stop:
            first = context_before + token - start
            length = window - first % window if is_prefilling[request] else 1
            length = min(length, stop - token)
            end = first + length
            far_end = max(first + 1 - local, 0) // page
            num_far = max(far_end - sink_pages, 0)
            is_sparse = num_far > budget_pages and end > dense_below
            if mergeable and not is_sparse and not first <= dense_below < end:
                columns[2, count - 1] += length
                columns[3, count - 1] = end
            else:
                columns[0, count] = request
                columns[1, count] = token
                columns[2, count] = length
                columns[3, count] = end
                has_regions = is_sparse or not merge
                columns[4, count] = sink_pages if has_regions else 0
                columns[5, count] = max(far_end, sink_pages) if has_regions else 0
                columns[6, count] = budget_pages if is_sparse else 0
                sparse[count] = is_sparse
                count += 1
            mergeable = merge and not is_sparse
            token += length
    return count
