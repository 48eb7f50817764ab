"""How widely each layer's scores spread over a prompt's pages, carried on the pages themselves.

ActQKV's information density (Xiao et al. 2025, arXiv 2502.13542): the entropy of the softmax of a
window's page scores, divided by its largest value ``log N``. The released code takes the softmax
of plain cosines; over hundreds of pages their entropies are all above 0.99 and tell layers apart
by nothing. So scores are standardised over the window's far pages first, and divided by a
temperature: what counts is whether some pages stand out from the rest, and by how much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.carry import NOWHERE, carried
from kvplug.compiled import compiled
from kvplug.stage import Layer, Memory

if TYPE_CHECKING:
    from kvplug.stage import Passage
    from kvplug.step import Step
    from kvplug.workspace import Workspace

OPERATIONS = 24
"""Of a score, its exponential mostly, to estimate work."""


class Densities(Memory):
    """Of all layers: mean density of a prompt's sparse windows, and how many there were.

    They lie on the pages of the prompt that they were computed from (:mod:`kvplug.carry`).
    """

    def __init__(self, layer: Layer) -> None:
        """Allocates; pages of which nothing is kept cost no memory."""
        super().__init__(layer)
        shape = self.shape
        self.means = torch.zeros(shape.num_pages, shape.num_layers, 2)
        """``[pages, L, 2]``: mean, number of windows."""
        self.host = self.means.numpy()

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See :attr:`means`."""
        return (self.means,)

    def nbytes(self) -> float:
        """Of prompts, which keep it on one page of a window; decoded tokens do on two."""
        return super().nbytes() * self.shape.page / self.shape.window


class LayerDensity(Memory):
    """A layer's own column of :class:`Densities`.

    Decoded tokens leave it as the prompt made it, so it is known before a decode step's first
    layer. That layer also hands every layer's on to a decoded block: a replay after a preemption
    may begin several in one step, and the first layer reads what the later ones have not written.
    """

    def __init__(self, layer: Layer) -> None:
        """Finds the columns."""
        super().__init__(layer)
        self.all = layer.shared(Densities)

    def watch(self, passage: Passage) -> None:
        """Hands on what is known to the step's windows."""
        stream = passage.step.stream
        _hand_on(
            stream.request, stream.num_tokens, stream.context_end, passage.step.stream_prefills,
            passage.step.block_table_host, self.shape.window, self.shape.page, self.shape.rank,
            self.all.host,
        )  # fmt: skip

    def learn(
        self, scores: torch.Tensor, step: Step, temperature: float, workspace: Workspace
    ) -> None:
        """Takes in the densities of the step's sparse prompt windows.

        Args:
            scores: ``[W, Hk, N]`` float32, as the index wrote them.
            step: The step.
            temperature: Of the softmax over standardised scores.
            workspace: Where buffers live.
        """
        if not step.stream_prefills.any():
            return
        stream, rows = step.stream, step.sparse_windows
        found = workspace.take("density.found", tuple(scores.shape[:2]), torch.float32)
        _densities(
            scores.numel() * OPERATIONS, scores.numpy(), rows, step.windows.far_begin,
            step.windows.far_end, np.float32(temperature), found.numpy(),
        )  # fmt: skip
        _learn(
            found.numpy(), stream.sparse, stream.request, stream.num_tokens, stream.context_end,
            step.stream_prefills, step.block_table_host, self.shape.window, self.shape.page,
            self.shape.rank, self.all.host,
        )  # fmt: skip


@njit(cache=True)
def _hand_on(  # type: ignore[no-untyped-def]
    request, num_tokens, context_end, prefills, block_table, window, page, rank, means
):
    """Copies what each window goes on from; the first layer does so for all where one decodes."""
    for s in range(request.shape[0]):
        end = context_end[s]
        before, here, also = carried(end - num_tokens[s], end, prefills[s], window, page)
        if here == NOWHERE:
            continue
        pages = block_table[request[s]]
        if not prefills[s]:
            if rank == 0 and before != NOWHERE:
                means[pages[here]] = means[pages[before]]
            continue
        for place in (here, also):
            if before == NOWHERE:
                means[pages[place], rank] = 0
            else:
                means[pages[place], rank] = means[pages[before], rank]


@njit(cache=True)
def _density(scores, temperature):  # type: ignore[no-untyped-def]
    """Entropy over ``log N`` of one row's standardised scores; NaN where it has no two numbers.

    NaN and infinities are pages that nobody would choose, so they are left out.
    """
    count, mean, spread = 0, 0.0, 0.0
    best = -np.inf
    for score in scores:
        if np.isfinite(score):
            count += 1
            mean += score
            best = max(best, score)
    if count < 2:
        return np.float32(np.nan)
    mean /= count
    for score in scores:
        if np.isfinite(score):
            spread += (score - mean) ** 2
    deviation = np.sqrt(spread / count)
    if deviation <= 1e-6 * abs(mean) + 1e-30:  # rounding at most: all pages are alike
        return np.float32(1)
    # H = log(sum e) - sum(e x) / sum(e), where x <= 0 is the tempered distance from the best.
    total, weighted = 0.0, 0.0
    for score in scores:
        if np.isfinite(score):
            x = np.float32((score - best) / (deviation * temperature))
            e = np.exp(x)
            total += e
            weighted += e * x
    return np.float32((np.log(total) - weighted / total) / np.log(count))


@compiled()
def _densities(scores, rows, far_begin, far_end, temperature, found):  # type: ignore[no-untyped-def]
    """``found[w, h]`` = density of a window's scores for a KV head."""
    heads = scores.shape[1]
    for task in prange(rows.shape[0] * heads):
        w, head = task // heads, task % heads
        pages = far_end[rows[w]] - far_begin[rows[w]]
        found[w, head] = _density(scores[w, head, :pages], temperature)


@njit(cache=True)
def _learn(  # type: ignore[no-untyped-def]
    found, sparse, request, num_tokens, context_end, prefills, block_table, window, page, rank,
    means,
):  # fmt: skip
    """Adds each sparse prompt window's density, averaged over heads, to the layer's mean."""
    w = -1
    for s in range(request.shape[0]):
        w += sparse[s]
        if not (sparse[s] and prefills[s]):
            continue
        total, heads = 0.0, 0
        for density in found[w]:
            if not np.isnan(density):
                total += density
                heads += 1
        end = context_end[s]
        before, here, also = carried(end - num_tokens[s], end, True, window, page)
        pages = block_table[request[s]]
        mean, count = means[pages[before], rank, 0], means[pages[before], rank, 1]
        if heads > 0:
            count += np.float32(1)
            mean += (np.float32(total / heads) - mean) / count
        for place in (here, also):
            means[pages[place], rank, 0], means[pages[place], rank, 1] = mean, count


def density_reference(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Twin of the density in plain torch, for finite scores.

    Args:
        scores: ``[..., N]``, N >= 2.
        temperature: Of the softmax over standardised scores.

    Returns:
        ``[...]`` float64 in [0, 1].
    """
    x = scores.double()
    spread = x.std(-1, unbiased=False, keepdim=True)
    z = (x - x.mean(-1, keepdim=True)) / spread.where(spread > 0, 1.0)
    log_p = (z / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(-1)
    return entropy / torch.tensor(float(x.shape[-1])).log()
