"""Running mean and variance of a request's queries, carried on the pages that it fills.

ActQKV (Xiao et al. 2025, arXiv 2502.13542) measures how far a query stands out from all that came
before. Its released code keeps one mean and one variance for all layers and requests together.
Here every layer has its own, and they lie on the pages of the prompt that they were computed from
(:mod:`kvplug.carry`). A request that shares a prefix finds the prefix's statistics with its pages,
and no other request can touch them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.carry import NOWHERE, carried
from kvplug.compiled import compiled
from kvplug.numeric import number
from kvplug.stage import Layer, Memory

if TYPE_CHECKING:
    from kvplug.stage import Passage

LANES = 16
"""Floats in a vector register, to estimate work."""
PASSES = 3
"""Vector operations per register of queries, to estimate work."""


class QueryStatistics(Memory):
    """Mean and variance of every query head's dimensions over the windows of a prompt.

    Windows of a prompt update it, a partial last one too; decoded tokens hand it on. A head with a
    NaN or an infinity in a window sits that window out, so that one bad token does not spoil what
    follows.
    """

    def __init__(self, layer: Layer) -> None:
        """Allocates; pages of which nothing is kept cost no memory."""
        super().__init__(layer)
        shape = self.shape
        self.means = torch.zeros(shape.num_pages, shape.num_heads, shape.head_dim)
        """``[pages, H, D]``."""
        self.variances = torch.zeros(shape.num_pages, shape.num_heads, shape.head_dim)
        """``[pages, H, D]``, unbiased; 0 where there is one query only."""
        self.counts = torch.zeros(shape.num_pages, shape.num_heads)
        """``[pages, H]`` queries seen."""
        self.host = (self.means.numpy(), self.variances.numpy(), self.counts.numpy())
        """The three as arrays."""

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See :meth:`Memory.state`."""
        return (self.means, self.variances, self.counts)

    def nbytes(self) -> float:
        """Of prompts, which keep it on one page of a window; decoded tokens do on two."""
        return super().nbytes() * self.shape.page / self.shape.window

    def watch(self, passage: Passage) -> None:
        """Takes in the step's windows, in order."""
        step, stream = passage.step, passage.step.stream
        queries, apart = passage.query_memory()
        _watch(
            len(queries) // LANES * PASSES, queries, apart,
            stream.request, stream.token_start, stream.num_tokens, stream.context_end,
            step.stream_prefills, step.block_table_host, self.shape.window, self.shape.page,
            *self.host,
        )  # fmt: skip


@njit(cache=True, fastmath={"contract"})
def _moments(queries, apart, first, count, mean, spread):  # type: ignore[no-untyped-def]
    """Mean and sum of squared deviations of ``count`` queries of one head; both ``[D]``.

    The first query's numbers are at ``first`` of the flat ``queries``, the next's ``apart`` later.
    Slices of flat memory have no gaps that the compiler could fear, so these loops run on vectors.
    """
    dim = mean.shape[0]
    mean[:] = 0
    spread[:] = 0
    for token in range(count):
        query = queries[first + token * apart : first + token * apart + dim]
        for d in range(dim):
            mean[d] += number(query[d])
    for d in range(dim):
        mean[d] /= np.float32(count)
    for token in range(count):
        query = queries[first + token * apart : first + token * apart + dim]
        for d in range(dim):
            delta = number(query[d]) - mean[d]
            spread[d] += delta * delta


@njit(cache=True, fastmath={"contract"})
def _pool(seen, count, mean, spread, means, variances):  # type: ignore[no-untyped-def]
    """Adds ``count`` queries of mean and spread to a mean and variance of ``seen``, in place."""
    if seen == 0:
        means[:] = mean
        variances[:] = spread / max(count - np.float32(1), np.float32(1))
        return
    total = seen + count
    share, weight = count / total, seen * count / total
    for d in range(mean.shape[0]):
        delta = mean[d] - means[d]
        squares = variances[d] * (seen - np.float32(1)) + spread[d]
        variances[d] = (squares + delta * delta * weight) / (total - np.float32(1))
        means[d] += delta * share


@compiled(fastmath={"contract"})
def _watch(  # type: ignore[no-untyped-def]
    queries, apart, request, token_start, num_tokens, context_end, prefills, block_table, window,
    page, means, variances, counts,
):  # fmt: skip
    """Goes on from what each window finds, and writes what it leaves.

    ``queries`` and ``apart`` are those of :meth:`Passage.query_memory`.
    """
    _, heads, dim = means.shape
    for head in prange(heads):
        mean, spread = np.empty(dim, dtype=np.float32), np.empty(dim, dtype=np.float32)
        for s in range(request.shape[0]):
            end = context_end[s]
            before, here, also = carried(end - num_tokens[s], end, prefills[s], window, page)
            if here == NOWHERE:
                continue
            pages = block_table[request[s]]
            here, also = pages[here], pages[also]
            seen = np.float32(0)
            if before != NOWHERE:
                before = pages[before]
                seen = counts[before, head]
                means[here, head] = means[before, head]
                variances[here, head] = variances[before, head]
            counts[here, head] = seen
            if prefills[s]:
                first = token_start[s] * apart + head * dim
                _moments(queries, apart, first, num_tokens[s], mean, spread)
                if np.isfinite(spread.sum()):
                    count = np.float32(num_tokens[s])
                    counts[here, head] = seen + count
                    _pool(seen, count, mean, spread, means[here, head], variances[here, head])
            if also != here:
                counts[also, head] = counts[here, head]
                means[also, head] = means[here, head]
                variances[also, head] = variances[here, head]


def pooled_reference(windows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Twin of :class:`QueryStatistics` in plain torch, for the windows of one prompt.

    The update of the paper's released code, with tokens counted instead of windows.

    Args:
        windows: ``[c, H, D]`` queries of each window, in order.

    Returns:
        Mean ``[H, D]``, variance ``[H, D]`` and the number of queries.
    """
    mean, variance, n = torch.zeros(1), torch.zeros(1), 0.0
    for window in windows:
        b = len(window)
        u, v = window.double().mean(0), window.double().var(0, unbiased=False)
        if n == 0:
            mean, variance = u, v * b / max(b - 1, 1)
        else:
            squares = variance * (n - 1) + v * b + (u - mean) ** 2 * n * b / (n + b)
            mean, variance = (mean * n + u * b) / (n + b), squares / (n + b - 1)
        n += b
    return mean, variance, n
