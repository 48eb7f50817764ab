"""Layers whose cache is a cold store, with hot pools in front of it."""

from __future__ import annotations

from typing import Any

import torch

from kvplug.offload.device_pool import DevicePool
from kvplug.offload.host_store import HostStore
from kvplug.offload.told_counts import ToldCounts
from tests.attention.device.world import DEVICE, SMALL, Shape, World
from tests.made_up import Piece


class PooledWorld(World):
    """As the base class, and every layer has a hot pool.

    Args:
        policy: The recipe's name.
        slots: Of each pool.
        shape: Sizes.
        layout: vLLM's name of the cache's physical order.
        layers: How many.
        options: Of the base class.
    """

    def __init__(
        self, policy: str, slots: int, shape: Shape = SMALL, layout: str = "LBHNC",
        layers: int = 1, **options: Any,
    ) -> None:  # fmt: skip
        size = 2 * shape.page * shape.dim * 2
        super().__init__(policy, shape, layout, layers, **options)
        self.told = ToldCounts(layers, size, DEVICE)
        self.pools = [
            DevicePool(self.cache, HostStore(), slots, self.told, rank) for rank in range(layers)
        ]
        self.turns = 0
        """Of the last step."""
        self.builder.pipeline.pools = self.pools
        for impl, pool in zip(self.impls, self.pools, strict=True):
            impl.hot = pool

    def fill(self, pieces: list[Piece], chunk: int = 10**6) -> None:
        """Pools follow what is written."""
        super().fill(pieces, chunk)
        for piece in pieces:
            if piece.start:
                part = [Piece(piece.request, 0, piece.start, True)]
                places = self.slots(piece.request, 0, piece.start).to(DEVICE)
                for pool in self.pools:
                    pool.write(self.new(part, 0), self.new(part, 1), places)

    def step(self, pieces: list[Piece]) -> torch.Tensor:
        """Pools are sound behind every step."""
        before = sum(self.told.turns)
        found = super().step(pieces)
        self.turns = (sum(self.told.turns) - before) // len(self.pools)
        assert all(pool.check_integrity() for pool in self.pools)
        return found

    def selected_as(self, plain: World) -> bool:
        """Whether both selected the same logical pages in the last step, in every layer."""
        return self._logical(self) == self._logical(plain)

    @staticmethod
    def _logical(world: World) -> list[dict[int, list[set[int]]]]:
        """Selections, with a page's place in its request for its number."""
        places = {page: n for pages in world.pages.values() for n, page in enumerate(pages)}
        return [
            {token: [{places[page] for page in pages} for pages in heads]
             for token, heads in selected.items()}
            for selected in world.selected()
        ]  # fmt: skip
