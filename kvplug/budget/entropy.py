"""Entropy budget: ActQKV's layer-wise cut-off (Xiao et al. 2025, arXiv 2502.13542).

At decode, layers share their pages by information density (:mod:`kvplug.budget.density`): a layer
whose scores spread over many pages gets more of them, one that knows what it wants fewer. In
prefill every layer gets the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from kvplug.budget.base import Budget
from kvplug.budget.density import LayerDensity
from kvplug.errors import KvplugError

if TYPE_CHECKING:
    import torch

    from kvplug.stage import Layer
    from kvplug.step import Step
    from kvplug.workspace import Workspace

LEAST = 32
"""Pages that every layer keeps, or half of the budget's where that is less."""


@dataclass(frozen=True)
class EntropyBudget(Budget):
    """All layers together get the budget times their number; each between half and twice of it."""

    name = "entropy"
    varies = True

    temperature: float = 0.5
    """Of the softmax over standardised scores; the lower, the more the best pages count."""

    def __post_init__(self) -> None:
        """Refuses temperatures that leave nothing to compare."""
        if not 0.01 <= self.temperature <= 100:
            raise KvplugError(
                f"entropy budget needs 0.01 <= temperature <= 100, not {self.temperature}."
            )

    def for_layer(self, layer: Layer) -> Budget:
        """See :meth:`Budget.for_layer`."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return _Bound(**own, density=layer.own(LayerDensity))

    def pages(self, budget: int, page: int) -> int:
        """See :meth:`Budget.pages`."""
        return budget // page

    def most_pages(self, budget: int, page: int) -> int:
        """See :meth:`Budget.most_pages`."""
        return 2 * self.pages(budget, page)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bound(EntropyBudget):
    """The budget of one layer."""

    density: LayerDensity

    def count(
        self, scores: torch.Tensor, queries: torch.Tensor, step: Step, counts: torch.Tensor,
        workspace: Workspace,
    ) -> None:  # fmt: skip
        """See :meth:`Budget.count`."""
        self.density.learn(scores, step, self.temperature, workspace)
        shape, windows = self.density.shape, step.stream
        _count(
            windows.sparse, windows.request, windows.num_tokens, windows.context_end,
            windows.far_begin, windows.far_end, step.stream_prefills, step.block_table_host,
            shape.window, shape.page, shape.rank, self.density.all.host, counts.numpy(),
        )  # fmt: skip


@njit(cache=True)
def share_out(means, rank, pages, num_far):  # type: ignore[no-untyped-def]
    """Pages of layer ``rank``, where ``[L, 2]`` ``means`` are mean density and windows behind it.

    A layer takes its density's share of what the layers before it left, and leaves the layers
    behind it at least the least. Where a layer has seen nothing, all get ``pages``.
    """
    layers = means.shape[0]
    least, most = max(min(LEAST, pages // 2), 1), min(2 * pages, num_far)
    behind = np.zeros(layers + 1)  # densities of a layer and all behind it
    for layer in range(layers - 1, -1, -1):
        if means[layer, 1] == 0:
            return pages
        behind[layer] = behind[layer + 1] + means[layer, 0]
    left = pages * layers
    mine = pages
    for layer in range(rank + 1):
        others = layers - 1 - layer
        share = means[layer, 0] / behind[layer] if behind[layer] > 0 else 1 / (others + 1)
        mine = int(np.floor(share * left + 0.5))
        mine = min(max(mine, least), most, left - others * least)
        left -= mine
    return mine


@njit(cache=True)
def _count(  # type: ignore[no-untyped-def]
    sparse, request, num_tokens, context_end, far_begin, far_end, prefills, block_table, window,
    page, rank, means, counts,
):  # fmt: skip
    """Writes the counts of decoded tokens; prompt windows keep theirs."""
    w = 0
    for s in range(sparse.shape[0]):
        if not sparse[s]:
            continue
        if not prefills[s]:
            opening = (context_end[s] - 1) // window * (window // page)
            known = means[block_table[request[s], opening]]
            counts[w] = share_out(known, rank, counts[w, 0], far_end[s] - far_begin[s])
        w += 1


def share_out_reference(densities: list[float], pages: int, num_far: int) -> list[int]:
    """Twin of :func:`share_out` in plain Python: pages of every layer."""
    least, most = max(min(LEAST, pages // 2), 1), min(2 * pages, num_far)
    shared, left = [], pages * len(densities)
    for layer, density in enumerate(densities):
        behind = densities[: layer - 1 if layer else None : -1]
        share = density / sum(behind) if sum(behind) > 0 else 1 / len(behind)
        wanted = max(int(share * left + 0.5), least)
        shared.append(min(wanted, most, left - (len(behind) - 1) * least))
        left -= shared[-1]
    return shared
