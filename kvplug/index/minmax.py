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
from kvplug.index.base import Index, PageIndex
from kvplug.numeric import bits_float, float_bits
from kvplug.stage import Layer

if TYPE_CHECKING:
    from kvplug.probe.base import Probes
    from kvplug.step import Step

LANES = 16
"""Partial sums of a bound."""
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
        shape = self.shape
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

    def write(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """See :meth:`PageIndex.write`.

        A page starts anew when its first slot is written, which vLLM does first whenever it hands
        a page to new content. Keys of rejected drafts widen the bounds until then: still bounds.
        """
        _widen_bounds(keys.numel(), keys.numpy(), slots.numpy(), self.shape.page, self._bounds_host)

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


@njit(cache=True, inline="always")
def _widened(bits):  # type: ignore[no-untyped-def]
    """The float32 value of bfloat16 ``bits``."""
    return bits_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@compiled()
def _widen_bounds(keys, slots, page, bounds):  # type: ignore[no-untyped-def]
    """Takes ``keys [T, Hk, D]`` into the bounds of their pages."""
    num_kv_heads, dim = keys.shape[1:]
    for head in prange(num_kv_heads):
        for token in range(slots.shape[0]):
            slot = slots[token]
            if slot < 0:
                continue
            low, high = bounds[slot // page, head, 0], bounds[slot // page, head, 1]
            fresh = slot % page == 0
            for d in range(dim):
                x = keys[token, head, d]
                if fresh or x < _widened(low[d]):
                    low[d] = _round_out(x, False)
                if fresh or x > _widened(high[d]):
                    high[d] = _round_out(x, True)


@njit(cache=True, fastmath={"contract"})
def _bound(query, low, high, lanes):  # type: ignore[no-untyped-def]
    """``sum_d max(q_d min_d, q_d max_d)``, added lane by lane: one order whoever calls."""
    dim = query.shape[0]
    lanes[:] = 0
    for d in range(0, dim - dim % LANES, LANES):
        for lane in range(LANES):
            q = query[d + lane]
            lanes[lane] += max(q * _widened(low[d + lane]), q * _widened(high[d + lane]))
    total = np.float32(0)
    for lane in range(LANES):
        total += lanes[lane]
    for d in range(dim - dim % LANES, dim):
        total += max(query[d] * _widened(low[d]), query[d] * _widened(high[d]))
    return total


@compiled()
def _score_bounds(  # type: ignore[no-untyped-def]
    bounds, vectors, counts, rows, request, far_begin, far_end, block_table, scale, scores
):
    """``scores[w, h, n] = scale * max over probes of sum_d max(q_d min_d, q_d max_d)``."""
    num_kv_heads = bounds.shape[1]
    for task in prange(rows.shape[0] * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        row = rows[w]
        lanes = np.empty(LANES, dtype=np.float32)
        pages = block_table[request[row], far_begin[row] : far_end[row]]
        for n in range(pages.shape[0]):
            low, high = bounds[pages[n], head, 0], bounds[pages[n], head, 1]
            best = np.float32(-np.inf)
            for r in range(counts[w]):
                best = max(best, _bound(vectors[w, head, r], low, high, lanes))
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
