"""Each layer's mean density over a prompt, carried on the pages of the prompt, on a GPU.

The twin on CPU is :mod:`kvplug.budget.density`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvplug.attention.device.attended import FarPagesAttended
from kvplug.attention.device.watchers import BoundLayer, DeviceState, DeviceWatcher
from kvplug.kernels.density_means import CarriedDensity, hand_on_densities, learn_densities
from kvplug.kernels.layer_shares import Densities, layer_shares

if TYPE_CHECKING:
    from kvplug.attention.device.plan import DevicePlan
    from kvplug.kernels.paged_attention import PagedCache


class DeviceDensities(DeviceState):
    """Of all layers; and how they share the budget of a step, which is found once for all."""

    def __init__(self, layer: BoundLayer) -> None:
        """Allocates."""
        super().__init__(layer)
        size = self.shape.num_pages, self.shape.num_layers, 2
        self.means = torch.zeros(size, device=layer.device)
        """``[pages, L, 2]`` float32: mean density of sparse windows, and how many there were."""
        self.attended = layer.shared(FarPagesAttended)
        self.ranks: set[int] = set()
        """Layers that ask for their shares here: of a model whose caches are in several groups, not
        all of them."""
        self._shared: tuple[DevicePlan, torch.Tensor] | None = None

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See :attr:`means`."""
        return (self.means,)

    def carried(self, plan: DevicePlan) -> CarriedDensity:
        """The step's windows that carry, over the means."""
        assert plan.stream is not None
        windows = plan.stream.carried
        where = windows.request, windows.before, windows.here, windows.also, windows.prefills
        return CarriedDensity(plan.block_table, *where, self.means)

    def shares(self, plan: DevicePlan, budget: int, least: int) -> torch.Tensor:
        """``[L, S, Hk]`` int32 far pages of the step's sparse windows in every layer.

        They follow from what earlier steps learnt, so the first layer that asks finds those of all,
        after decoded tokens have handed on what they know.

        Args:
            plan: The step, in which some window is sparse.
            budget: Far pages of a layer where nothing is known.
            least: Pages that a layer keeps.
        """
        if self._shared is None or self._shared[0] is not plan:
            windows = plan.sparse
            assert windows is not None
            assert windows.before is not None
            assert windows.prefills is not None
            known = Densities(
                plan.block_table, windows.request, windows.before, windows.prefills,
                windows.far_begin, windows.far_end, self.means,
            )  # fmt: skip
            size = self.shape.num_layers, len(windows), self.shape.num_kv_heads
            counts = torch.empty(size, dtype=torch.int32, device=self.means.device)
            has_all = len(self.ranks) == self.shape.num_layers
            total = self.attended.total if has_all else torch.zeros_like(self.attended.total)
            layer_shares(known, budget, least, counts, total)
            if not has_all:
                self.attended.total += sum(counts[rank].sum() for rank in self.ranks)
            self._shared = plan, counts
        return self._shared[1]


class DeviceLayerDensity(DeviceWatcher):
    """A layer's own column of them."""

    def __init__(self, layer: BoundLayer) -> None:
        """Finds the columns."""
        super().__init__(layer)
        self.all = layer.shared(DeviceDensities)
        self.all.ranks.add(self.shape.rank)

    def watch(
        self, queries: torch.Tensor, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan
    ) -> None:
        """Hands on what is known to the step's windows; decoded tokens', for all, by the first."""
        assert plan.stream is not None
        windows = plan.stream.carried
        if windows.prompts or (len(windows) and self.shape.rank == 0):
            hand_on_densities(self.all.carried(plan), self.shape.rank)

    def learn(self, plan: DevicePlan, found: torch.Tensor) -> None:
        """Takes in the densities of the step's sparse prompt windows.

        Args:
            plan: The step.
            found: ``[S, Hk]`` float32 of its sparse windows; those of decoded tokens are not read.
        """
        assert plan.stream is not None
        rows = plan.stream.carried.sparse
        learn_densities(self.all.carried(plan), self.shape.rank, rows, found)
