"""Min/max index: per-page bounds of every key dimension (Quest, Tang et al. 2024, 2406.10774).

The score of a page, ``sum_d max(q_d * min_d, q_d * max_d)``, is an upper bound of ``q . k`` over
the page's keys; times the layer's scale, of its attention logits. Bounds are kept as bfloat16,
rounded outwards, so they stay bounds for any dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.index.base import Index, PageIndex, read_pages
from kvplug.numeric import float_bits, from_bfloat16
from kvplug.stage import Layer

if TYPE_CHECKING:
    from kvplug.probe.base import Probes
    from kvplug.step import Sealing, Step
    from kvplug.workspace import Workspace

LANES = 16
"""Floats in a vector register, to estimate work."""
PAGES_PER_TASK = 256
"""Pages scored by one thread at a time."""
OPERATIONS = 4
"""Vector operations per LANES dimensions of a bound, to estimate work."""


@dataclass(frozen=True)
class MinMax(Index):
    """Scores are upper bounds of the probes' logits with a page's keys."""

    name = "minmax"
    gives = frozenset({"logits"})

    def for_layer(self, layer: Layer) -> MinMaxIndex:
        """See :meth:`Index.for_layer`."""
        return MinMaxIndex(layer)


class MinMaxIndex(PageIndex):
    """Two bfloat16 vectors per page and KV head: ``[pages, Hk, 2, D]``, minima then maxima."""

    def __init__(self, layer: Layer) -> None:
        """Allocates the bounds (untouched pages cost no memory)."""
        super().__init__(layer)
        shape, self._reader = self.shape, layer.row_reader
        self._bounds = torch.zeros(
            (shape.num_pages, shape.num_kv_heads, 2, shape.head_dim), dtype=torch.int16
        )
        self._bounds_host = self._bounds.numpy().view(np.uint16)

    @property
    def bounds(self) -> torch.Tensor:
        """``[pages, Hk, 2, D]`` bfloat16: minima, then maxima, of the page's keys."""
        return self._bounds.view(torch.bfloat16)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See :attr:`bounds`."""
        return (self._bounds,)

    def seal(self, sealed: Sealing, step: Step, workspace: Workspace) -> None:
        """Bounds the pages' keys."""
        heads = self.shape.num_kv_heads
        for part, keys in read_pages(self._reader, sealed.pages, heads, workspace):
            work, pages = keys.numel() // LANES, sealed.pages[part]
            _bound_pages(work, keys.numpy(), pages, self._bounds_host)

    def score(self, probes: Probes, step: Step, scores: torch.Tensor) -> None:
        """See :meth:`PageIndex.score`; the score is the largest bound of any probe."""
        windows = step.windows
        work = scores.numel() * probes.vectors.shape[2] * self.shape.head_dim * OPERATIONS // LANES
        _score_bounds(
            work, self._bounds_host,
            probes.vectors.numpy(), probes.counts.numpy(), step.sparse_windows,
            windows.request, windows.far_begin, windows.far_end, step.block_table_host,
            np.float32(self.shape.scale), scores.numpy(),
        )  # fmt: skip


@njit(cache=True, inline="always")
def _round_out(value, upwards):  # type: ignore[no-untyped-def]
    """``value`` as bfloat16 bits, rounded up or down."""
    bits = float_bits(value)
    cut = bits & np.uint32(0xFFFF)
    negative = bits >> np.uint32(31) == 1
    bits >>= np.uint32(16)
    if cut != 0 and negative != upwards:
        bits += np.uint32(1)
    return np.uint16(bits)


@compiled()
def _bound_pages(keys, pages, bounds):  # type: ignore[no-untyped-def]
    """``bounds[pages[n], head] = least and largest of keys[n, head]``, rounded outwards."""
    num_kv_heads, page, dim = keys.shape[1:]
    for task in prange(pages.shape[0] * num_kv_heads):
        n, head = task // num_kv_heads, task % num_kv_heads
        low, high = keys[n, head, 0].copy(), keys[n, head, 0].copy()
        for token in range(1, page):
            key = keys[n, head, token]
            for d in range(dim):
                low[d] = min(low[d], key[d])
                high[d] = max(high[d], key[d])
        for d in range(dim):
            bounds[pages[n], head, 0, d] = _round_out(low[d], False)
            bounds[pages[n], head, 1, d] = _round_out(high[d], True)


@njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
def _bound(query, low, high):  # type: ignore[no-untyped-def]
    """``sum_d max(q_d min_d, q_d max_d)``, in the one order that the compiler chooses."""
    total = np.float32(0)
    for d in range(query.shape[0]):
        least, most = query[d] * from_bfloat16(low[d]), query[d] * from_bfloat16(high[d])
        total += most if most > least else least
    return total


@compiled()
def _score_bounds(  # type: ignore[no-untyped-def]
    bounds, vectors, counts, rows, request, far_begin, far_end, block_table, scale, scores
):
    """``scores[w, h, n] = scale * max over probes of sum_d max(q_d min_d, q_d max_d)``."""
    num_windows, num_kv_heads = scores.shape[:2]
    blocks = (scores.shape[2] + PAGES_PER_TASK - 1) // PAGES_PER_TASK
    for task in prange(num_windows * blocks):
        w, first = task // blocks, task % blocks * PAGES_PER_TASK
        row = rows[w]
        pages = block_table[request[row], far_begin[row] : far_end[row]]
        for n in range(first, min(first + PAGES_PER_TASK, pages.shape[0])):
            for head in range(num_kv_heads):
                low, high = bounds[pages[n], head, 0], bounds[pages[n], head, 1]
                best = np.float32(-np.inf)
                for r in range(counts[w]):
                    best = max(best, _bound(vectors[w, head, r], low, high))
                scores[w, head, n] = scale * best


def minmax_scores_reference(
    keys: torch.Tensor, probes: torch.Tensor, page: int, scale: float = 1.0
) -> torch.Tensor:
    """Twin of :meth:`MinMaxIndex.score` in plain torch, for one window over whole pages.

    Args:
        keys: ``[N * P, Hk, D]`` keys of the far pages in logical order.
        probes: ``[Hk, R, D]``.
        page: P.
        scale: Of the layer's logits.

    Returns:
        ``[Hk, N]`` float32.
    """
    paged = keys.float().unflatten(0, (-1, page))  # [N, P, Hk, D]
    low, high = paged.amin(1), paged.amax(1)  # [N, Hk, D]
    low, high = low.transpose(0, 1)[:, None], high.transpose(0, 1)[:, None]  # [Hk, 1, N, D]
    probes = probes.float()[:, :, None]  # [Hk, R, 1, D]
    return scale * torch.maximum(probes * low, probes * high).sum(-1).amax(1)
