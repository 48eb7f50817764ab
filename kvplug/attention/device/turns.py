"""Windows of a step whose pages fit a hot pool together, cut on the host from lengths.

Which pages a window selects the host does not know, but how many at most: a row has a width, and
rows of one request list no more different pages than its context has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvplug.attention.device.plan import DevicePlan, SparseWindows, singles_first
from kvplug.windows import Ints


class Turn(NamedTuple):
    """Windows that are attended together."""

    windows: SparseWindows
    rows: slice
    """Theirs in a table of all windows and KV heads."""
    most: int
    """Different pages of single KV heads that they list at most."""


class Pool(NamedTuple):
    """What windows have to fit."""

    width: int
    """Pages of the widest row."""
    heads: int
    """Hk."""
    slots: int
    """Of the pool, at least ``width * heads``."""


def turns_of(plan: DevicePlan, page: int, pool: Pool) -> list[Turn]:
    """Cuts a step's sparse windows into turns.

    Args:
        plan: The step, with sparse windows.
        page: P.
        pool: Of every layer.
    """
    assert plan.sparse is not None
    order = singles_first(plan.windows)
    pages = -(-plan.windows.context_end[order] // page)
    tokens = plan.windows.num_tokens[order][plan.sparse.singles :]
    return _cut(plan.sparse, plan.windows.request[order], pages, tokens, pool)


def decode_turns(sparse: SparseWindows, longest: int, pool: Pool) -> list[Turn]:
    """Cuts a batch of decoded tokens into turns that its size alone decides, as a graph needs it.

    Args:
        sparse: One window a request.
        longest: Pages of the longest context.
        pool: Of every layer.
    """
    requests = np.arange(len(sparse), dtype=np.int32)
    return _cut(sparse, requests, np.full_like(requests, longest), requests[:0], pool)


def _cut(sparse: SparseWindows, request: Ints, pages: Ints, tokens: Ints, pool: Pool) -> list[Turn]:
    """Turns of windows of so many pages, the tokens of all but those of one token given."""
    starts, turns, heads = np.cumsum([0, *tokens]), [], pool.heads
    for first, last, most in fitting(request, pages, pool.width, pool.slots // heads):
        begin, end = (max(place - sparse.singles, 0) for place in (first, last))
        part = sparse.span(first, last)
        query_start = sparse.query_start[begin : end + 1]
        if begin:
            query_start = query_start - int(starts[begin])
        mine = sparse.tokens[starts[begin] : starts[end]]
        windows = SparseWindows(*part[:3], mine, query_start, *part[5:])
        turns.append(Turn(windows, slice(first * heads, last * heads), most * heads))
    return turns


def fitting(request: Ints, pages: Ints, width: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Runs of windows that list no more than ``most`` different pages of a KV head.

    Args:
        request: ``[S]`` whose windows they are.
        pages: ``[S]`` pages of their contexts.
        width: Pages of the widest row.
        most: At least ``width``.

    Yields:
        First window, the one behind the last, and pages that they list at most.
    """
    listed = np.minimum(pages, width)
    if listed.sum() <= most:
        yield 0, len(pages), int(listed.sum())
        return
    first, total = 0, 0
    rows: dict[int, int] = {}  # of each request, pages of its rows
    contexts: dict[int, int] = {}  # and of its longest context
    for s, (mine, own, all_pages) in enumerate(
        zip(request.tolist(), listed.tolist(), pages.tolist(), strict=True)
    ):
        before = min(rows.get(mine, 0), contexts.get(mine, 0))
        sizes = rows.get(mine, 0) + own, max(contexts.get(mine, 0), all_pages)
        if total + min(sizes) - before > most:
            yield first, s, total
            first, total, before, sizes = s, 0, 0, (own, all_pages)
            rows.clear()
            contexts.clear()
        rows[mine], contexts[mine] = sizes
        total += min(sizes) - before
    yield first, len(pages), total
