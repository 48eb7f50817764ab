"""How many far pages a window gets on a GPU, where that is not the same for all.

They are those of the budgets on CPU, :mod:`kvplug.budget`. Counts stay on the GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from kvplug.attention.device.attended import FarPagesAttended
from kvplug.attention.device.densities import DeviceLayerDensity
from kvplug.budget.entropy import LEAST, EntropyBudget
from kvplug.budget.top_p import TopPBudget
from kvplug.kernels.page_density import page_density
from kvplug.kernels.top_p import top_p

if TYPE_CHECKING:
    from kvplug.attention.device.plan import DevicePlan, SparseWindows
    from kvplug.attention.device.watchers import BoundLayer
    from kvplug.budget.base import Budget


class DeviceBudget(ABC):
    """Counts far pages of a layer's windows."""

    @abstractmethod
    def count(
        self, scores: torch.Tensor, windows: SparseWindows, first: int, pages: int, plan: DevicePlan
    ) -> torch.Tensor:
        """``[s, Hk]`` int32 pages to select, at most twice ``pages``; nothing waits.

        What it counts is added to :class:`~kvplug.attention.device.attended.FarPagesAttended`.

        Args:
            scores: ``[s, Hk, N]`` float32, as the index wrote them.
            windows: Some of the step's sparse windows.
            first: Which one of these is the first of them.
            pages: The budget.
            plan: The step.
        """

    @abstractmethod
    def learn(self, plan: DevicePlan) -> None:
        """Learns from the scores of a step, after all of its sparse windows were counted."""


class DeviceEntropy(DeviceBudget):
    """At decode layers share their pages by the densities of the prompt.

    Args:
        temperature: Of the softmax over standardised scores.
        layer: The layer, which then watches.
    """

    def __init__(self, temperature: float, layer: BoundLayer) -> None:
        """Asks for the densities."""
        self.temperature, self.shape = temperature, layer.shape
        self.density = layer.own(DeviceLayerDensity)
        self._found: torch.Tensor | None = None

    def count(
        self, scores: torch.Tensor, windows: SparseWindows, first: int, pages: int, plan: DevicePlan
    ) -> torch.Tensor:
        """See :meth:`DeviceBudget.count`."""
        assert plan.stream is not None
        assert plan.sparse is not None
        mine = slice(first, first + len(windows))
        if plan.stream.carried.scored:
            if self._found is None:
                self._found = scores.new_empty((len(plan.sparse), self.shape.num_kv_heads))
            assert windows.prefills is not None
            page_density(
                scores, windows.far_begin, windows.far_end, windows.prefills, self.temperature,
                self._found[mine],
            )  # fmt: skip
        least = max(min(LEAST, pages // 2), 1)
        return self.density.all.shares(plan, pages, least)[self.shape.rank, mine]

    def learn(self, plan: DevicePlan) -> None:
        """See :meth:`DeviceBudget.learn`."""
        if self._found is not None:
            self.density.learn(plan, self._found)
            self._found = None


class DeviceTopP(DeviceBudget):
    """The fewest pages that hold a share of the estimated attention, up to the budget.

    Args:
        budget: What was asked for.
        layer: The layer.
    """

    def __init__(self, budget: TopPBudget, layer: BoundLayer) -> None:
        """Holds its arguments."""
        self.p, self.temperature = budget.p, budget.temperature
        self.attended = layer.shared(FarPagesAttended)

    def count(
        self, scores: torch.Tensor, windows: SparseWindows, first: int, pages: int, plan: DevicePlan
    ) -> torch.Tensor:
        """See :meth:`DeviceBudget.count`."""
        counts = scores.new_empty(scores.shape[:2], dtype=torch.int32)
        if self.p == 1:
            self.attended.total += counts.numel() * pages
            return counts.fill_(pages)
        top_p(
            scores, windows.far_begin, windows.far_end, pages, self.p, self.temperature,
            torch.empty_like(scores), counts, self.attended.total,
        )  # fmt: skip
        return counts

    def learn(self, plan: DevicePlan) -> None:
        """Nothing: a row's scores say all."""


def make_budget(budget: Budget, layer: BoundLayer) -> DeviceBudget | None:
    """What counts a layer's pages; None where every window gets the budget."""
    if isinstance(budget, EntropyBudget):
        return DeviceEntropy(budget.temperature, layer)
    if isinstance(budget, TopPBudget):
        return DeviceTopP(budget, layer)
    return None
