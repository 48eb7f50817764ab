"""From surprises to event starts: threshold, refinement, shortest event, page edges.

A token begins an event where its surprise exceeds ``mu + gamma * sigma`` of the tokens before its
window. Windows lie at absolute places in the request and only look back, so the result is the same
however the scheduler cuts the prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.segment.refine import best_split, best_split_reference


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


@compiled()
def cut_events(  # type: ignore[no-untyped-def]
    cutting, runs, request, first, offset, new, block_table, sums, sums_first,
    surprise, boundary, starts,
):  # fmt: skip
    """Learns the events of a step's prompt windows, request by request, in the windows' order.

    Args:
        cutting: :class:`Cutting`.
        runs: ``[r + 1]`` first window of each request, then their number n.
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
    for run in prange(runs.shape[0] - 1):
        for w in range(runs[run], runs[run + 1]):
            mine = new[offset[w] : offset[w + 1]]
            pages, begin = block_table[request[w]], first[w]
            _store(mine, begin, pages, surprise)
            limit = _limit(cutting, mine, begin, pages, surprise)
            _mark(cutting, limit, mine, begin, pages, sums[w], sums_first[w], boundary)
            _flag(begin, begin + mine.shape[0], pages, boundary, starts)


@njit(cache=True)
def _store(mine, begin, pages, surprise):  # type: ignore[no-untyped-def]
    """Files a window's surprises under their slots."""
    page = surprise.shape[1]
    for i in range(mine.shape[0]):
        surprise[pages[(begin + i) // page], (begin + i) % page] = mine[i]


@njit(cache=True)
def _limit(cutting, mine, begin, pages, surprise):  # type: ignore[no-untyped-def]
    """``mu + gamma * sigma`` of the history, or of the window itself where there is none."""
    page = surprise.shape[1]
    start = max(begin - cutting.history, 0)
    past = np.empty(begin - start, dtype=np.float32)
    for i in range(begin - start):
        past[i] = surprise[pages[(start + i) // page], (start + i) % page]
    limit = _threshold(past, cutting.gamma)
    return limit if limit == limit else _threshold(mine, cutting.gamma)


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
    cutting, limit, mine, begin, pages, sums, sums_first, boundary
):
    """Marks the tokens of a window that begin events."""
    page, end = boundary.shape[1], begin + mine.shape[0]
    last = begin - 1
    lowest = max(begin - max(cutting.least, cutting.most), 0)
    while last > lowest and boundary[pages[last // page], last % page] == 0:
        last -= 1
    last = max(last, 0)  # a request begins an event
    for i in range(mine.shape[0]):
        token = begin + i
        if not mine[i] > limit or token - last < cutting.least:
            continue
        if cutting.metric:
            before = max(last, token - cutting.most)
            half = (token - before) // 2
            low = max(before - half, sums_first)
            high = min(token + half, end)
            candidate = max(before + cutting.least, begin)
            if low < candidate and candidate < token:
                token = sums_first + best_split(
                    sums, low - sums_first, high - sums_first,
                    candidate - sums_first, token - sums_first, cutting.metric,
                )  # fmt: skip
        boundary[pages[token // page], token % page] = 1
        last = token


@njit(cache=True)
def _flag(begin, end, pages, boundary, starts):  # type: ignore[no-untyped-def]
    """Marks the pages of a window whose first edge is the nearest one to a boundary."""
    page = boundary.shape[1]
    half = page // 2
    for n in range(begin // page, (end + page - 1) // page):
        found = 0
        for token in range(max(n * page - half, 0), min(n * page - half + page, end)):
            found |= boundary[pages[token // page], token % page]
        starts[pages[n]] = found


def boundaries_reference(
    surprise: torch.Tensor, window: int, cutting: Cutting, keys: torch.Tensor, metric: str
) -> list[int]:
    """Twin of :func:`cut_events` in plain torch, for a whole prompt.

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
    for begin in range(0, len(surprise), window):
        mine = surprise[begin : begin + window].double()
        past = surprise[max(begin - cutting.history, 0) : begin].double()
        known = [part[~part.isnan()] for part in (past, mine)]
        known = [part for part in known if len(part) > 1]
        if not known:
            continue
        limit = float(known[0].mean() + cutting.gamma * known[0].std())
        for token in (begin + (mine > limit).nonzero().flatten()).tolist():
            last = found[-1] if found else 0
            if token - last < cutting.least:
                continue
            before, end = max(last, token - cutting.most), begin + len(mine)
            half = (token - before) // 2
            low, high = max(before - half, 0), min(token + half, end)
            candidate = max(before + cutting.least, begin)
            chosen = token
            if metric != "none" and low < candidate < token:
                chosen = best_split_reference(keys, low, high, candidate, token, metric)
            found.append(chosen)
    return found


def starts_reference(boundaries: list[int], tokens: int, page: int) -> list[int]:
    """Logical pages of a prompt that begin events, page 0 aside unless a boundary is next to it."""
    edges = {(token + page // 2) // page for token in boundaries}
    return sorted(edge for edge in edges if edge * page < tokens)
