"""From surprises to event starts: threshold, refinement, shortest event, page edges.

A token begins an event where its surprise exceeds ``mu + gamma * sigma`` of the tokens before its
window. Windows lie at absolute places in the request, so the result is the same however the
scheduler cuts the prompt. And what is found on a page follows from the tokens up to the page's end:
vLLM's prefix cache knows no more of a page than that, and may put together pages of several
requests, of which some ended where others went on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit

from kvplug.segment.refine import best_split, best_split_reference

BEGINS, SURPRISES = 1, 2
"""Marks of a token: an event begins here; the surprise that made one did, before refinement."""


class Cutting(NamedTuple):
    """How events are cut. Lengths are in tokens."""

    gamma: float
    """Standard deviations above the mean at which a token begins an event."""
    history: int
    """Tokens before a window that mean and deviation are taken over."""
    least: int
    """Of an event: boundaries nearer to the last one are dropped."""
    most: int
    """Of an event, in whole pages: refinement looks no further back."""
    metric: int
    """See :mod:`kvplug.segment.refine`."""
    page: int
    """P."""

    @property
    def reach(self) -> int:
        """Tokens before a window whose keys refinement may read, in whole pages."""
        return -(-3 * self.most // 2 // self.page) * self.page


@njit(cache=True)
def cut_events(  # type: ignore[no-untyped-def]
    cutting, request, first, offset, new, block_table, sums, sums_first, surprise, boundary,
    starts,
):  # fmt: skip
    """Learns the events of prompt windows, one after the other: requests may share pages.

    Args:
        cutting: :class:`Cutting`.
        request: ``[n]`` row of the block table.
        first: ``[n]`` position of each window's first token.
        offset: ``[n + 1]`` where its tokens begin in ``new``.
        new: ``[T]`` their surprises.
        block_table: ``[B, max_pages]``.
        sums: ``[n, m, E]`` prefix sums of keys; empty without refinement.
        sums_first: ``[n]`` position of each window's first summed token.
        surprise: ``[pages, P]``, written, as are the next two.
        boundary: ``[pages, P]``.
        starts: ``[pages]``.
    """
    for w in range(request.shape[0]):
        mine = new[offset[w] : offset[w + 1]]
        pages, begin = block_table[request[w]], first[w]
        _store(mine, begin, pages, surprise)
        past = _past(cutting, begin, pages, surprise)
        _mark(cutting, past, mine, begin, pages, sums[w], sums_first[w], boundary)
        _flag(begin, begin + mine.shape[0], pages, boundary, starts)


@njit(cache=True)
def _store(mine, begin, pages, surprise):  # type: ignore[no-untyped-def]
    """Files a window's surprises under their slots."""
    page = surprise.shape[1]
    for i in range(mine.shape[0]):
        surprise[pages[(begin + i) // page], (begin + i) % page] = mine[i]


@njit(cache=True)
def _past(cutting, begin, pages, surprise):  # type: ignore[no-untyped-def]
    """The surprises of the history before a window."""
    page = surprise.shape[1]
    start = max(begin - cutting.history, 0)
    past = np.empty(begin - start, dtype=np.float32)
    for i in range(begin - start):
        past[i] = surprise[pages[(start + i) // page], (start + i) % page]
    return past


@njit(cache=True)
def _threshold(values, gamma):  # type: ignore[no-untyped-def]
    """``mu + gamma * sigma`` (unbiased) of what is no NaN; NaN of fewer than two values."""
    count, total, spread = 0, 0.0, 0.0
    for i in range(values.shape[0]):
        if values[i] == values[i]:
            count += 1
            total += values[i]
    if count < 2:
        return np.nan
    mean = total / count
    for i in range(values.shape[0]):
        if values[i] == values[i]:
            spread += (values[i] - mean) ** 2
    sigma = (spread / (count - 1)) ** 0.5
    return mean + gamma * sigma if gamma < np.inf else np.inf


@njit(cache=True)
def _mark(  # type: ignore[no-untyped-def]
    cutting, past, mine, begin, pages, sums, sums_first, boundary
):
    """Marks the tokens of a window that begin events.

    Without a history, as in a request's first window, a page is measured by the window up to the
    page's end.
    """
    page, end = boundary.shape[1], begin + mine.shape[0]
    limit = _threshold(past, cutting.gamma)
    has_past = limit == limit
    back = max(cutting.least, cutting.most)
    last = _last(begin, back, pages, boundary, BEGINS)
    spike = _last(begin, back, pages, boundary, BEGINS | SURPRISES)
    for i in range(mine.shape[0]):
        token = begin + i
        page_begin = token // page * page
        page_end = min(page_begin + page, end)
        if not has_past and token == page_begin:
            limit = _threshold(mine[: page_end - begin], cutting.gamma)
        if not mine[i] > limit or token - spike < cutting.least:
            continue
        spike = token
        if cutting.metric:
            last = _refined(cutting, token, last, page_begin, page_end, sums, sums_first)
            boundary[pages[token // page], token % page] |= SURPRISES
        else:
            last = token
        boundary[pages[last // page], last % page] |= BEGINS


@njit(cache=True)
def _last(begin, back, pages, boundary, which):  # type: ignore[no-untyped-def]
    """The last token before ``begin`` with one of these marks, at most ``back`` tokens away."""
    page = boundary.shape[1]
    token, lowest = begin - 1, max(begin - back, 0)
    while token > lowest and not boundary[pages[token // page], token % page] & which:
        token -= 1
    return max(token, 0)  # a request begins an event


@njit(cache=True)
def _refined(  # type: ignore[no-untyped-def]
    cutting, token, last, page_begin, page_end, sums, sums_first
):
    """Where the event of a surprising token begins; see :func:`split_range`."""
    begin, end, first = split_range(cutting, token, last, page_begin, page_end)
    if first >= token:
        return token
    return sums_first + best_split(
        sums, begin - sums_first, end - sums_first, first - sums_first, token - sums_first,
        cutting.metric,
    )  # fmt: skip


@njit(cache=True)
def split_range(cutting, token, last, page_begin, page_end):  # type: ignore[no-untyped-def]
    """The tokens to split in two, and the first candidate.

    As the paper has it, from half an event before the last boundary to half an event behind the
    token, an event being what lies between the two. Where the page ends before, the event is taken
    to be that much shorter: modularity favours halves of equal weight, and would otherwise split
    the longer side.

    Args:
        cutting: Lengths.
        token: The surprising token.
        last: Where the last event begins.
        page_begin: First token of the page.
        page_end: Behind the last token that may be looked at.

    Returns:
        First token; the one behind the last; first candidate, after the token if there is none.
    """
    before = max(last, token - cutting.most)
    half = min((token - before) // 2, page_end - token)
    before = max(before, token - 2 * half)
    begin = max(before - half, 0)
    return begin, token + half, max(before + cutting.least, page_begin, begin + 1)


@njit(cache=True)
def _flag(begin, end, pages, boundary, starts):  # type: ignore[no-untyped-def]
    """Marks the pages of a window whose first edge is the nearest one to a boundary."""
    page = boundary.shape[1]
    half = page // 2
    for n in range(begin // page, (end + page - 1) // page):
        found = 0
        for token in range(max(n * page - half, 0), min(n * page - half + page, end)):
            found |= boundary[pages[token // page], token % page] & BEGINS
        starts[pages[n]] = found


def boundaries_reference(
    surprise: torch.Tensor, window: int, cutting: Cutting, keys: torch.Tensor, metric: str
) -> list[int]:
    """Twin of :func:`cut_events` in plain torch, for a whole prompt, page by page.

    Args:
        surprise: ``[T]``.
        window: Tokens per window.
        cutting: Lengths and gamma.
        keys: ``[T, Hk, D]``, of use where a metric is named.
        metric: Its name, or ``none``.

    Returns:
        The tokens that begin events, position 0 aside, ascending.
    """
    found: list[int] = []
    spike = 0
    for begin in range(0, len(surprise), cutting.page):
        end = min(begin + cutting.page, len(surprise))
        opening = begin // window * window
        past = surprise[max(opening - cutting.history, 0) : opening].double()
        known = [part[~part.isnan()] for part in (past, surprise[opening:end].double())]
        known = [part for part in known if len(part) > 1]
        if not known:
            continue
        limit = float(known[0].mean() + cutting.gamma * known[0].std())
        for token in (begin + (surprise[begin:end] > limit).nonzero().flatten()).tolist():
            if token - spike < cutting.least:
                continue
            spike = chosen = token
            last = found[-1] if found else 0
            low, high, first = split_range(cutting, token, last, begin, end)
            if metric != "none" and first < token:
                chosen = best_split_reference(keys, low, high, first, token, metric)
            found.append(chosen)
    return found


def starts_reference(boundaries: list[int], tokens: int, page: int) -> list[int]:
    """Logical pages of a prompt that begin events, page 0 aside unless a boundary is next to it."""
    edges = {(token + page // 2) // page for token in boundaries}
    return sorted(edge for edge in edges if edge * page < tokens)
