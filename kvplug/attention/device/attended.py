"""How many far pages were selected where budgets vary: counted on the GPU, told without waiting.

The GPU adds up in memory of its own. At the end of every step the sum starts on its way to memory
that the host reads whenever it likes, so what is read is that of the last step whose sum came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvplug.attention.device.watchers import DeviceState

if TYPE_CHECKING:
    from kvplug.attention.device.watchers import BoundLayer


class FarPagesAttended(DeviceState):
    """Of all layers."""

    def __init__(self, layer: BoundLayer) -> None:
        """Starts at 0."""
        super().__init__(layer)
        is_remote = layer.device.type == "cuda"
        self.total = torch.zeros(1, dtype=torch.int64, device=layer.device)
        """``[1]`` int64: far pages by window, KV head and layer."""
        self._told = torch.zeros(1, dtype=torch.int64, pin_memory=is_remote)

    def tell(self) -> None:
        """Sends what was counted so far; nobody waits for it."""
        self._told.copy_(self.total, non_blocking=True)

    @property
    def told(self) -> int:
        """What has come."""
        return int(self._told)
