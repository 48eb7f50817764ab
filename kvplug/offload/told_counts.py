"""What hot pools on a GPU count: added up there, told without waiting.

The GPU adds up in memory of its own. At the end of every step that retrieves the sums start on
their way to memory that the host reads whenever it likes, so what is read is that of the last step
whose sums came.
"""

from __future__ import annotations

import torch

from kvplug.offload.counts import PoolCounts


class ToldCounts:
    """Of all layers.

    Args:
        layers: How many.
        page_bytes: Of a page of one KV head, keys and values.
        device: Where pools are.
    """

    def __init__(self, layers: int, page_bytes: int, device: torch.device) -> None:
        """Starts at 0."""
        self.page_bytes = page_bytes
        self.total = torch.zeros((layers, 3), dtype=torch.int64, device=device)
        """``[layers, 3]`` int64 hits, misses and evictions."""
        is_remote = device.type == "cuda"
        self._told = torch.zeros((layers, 3), dtype=torch.int64, pin_memory=is_remote)
        self.turns, self.written = [0] * layers, [0] * layers
        """Of each layer, calls of attention and bytes of new keys and values; the host knows."""

    def send(self) -> None:
        """Sends what was counted so far; nobody waits for it."""
        self._told.copy_(self.total, non_blocking=True)

    def of(self, rank: int) -> PoolCounts:
        """What has come of a layer."""
        hits, misses, evictions = self._told[rank].tolist()
        return PoolCounts(
            hits=hits, misses=misses, evictions=evictions, bytes_read=misses * self.page_bytes,
            bytes_written=self.written[rank], turns=self.turns[rank],
        )  # fmt: skip

    @property
    def counts(self) -> PoolCounts:
        """Of all layers together."""
        return sum((self.of(rank) for rank in range(len(self.turns))), PoolCounts())
