"""All hot pools of a worker: what they lost, and what they count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvplug.offload.counts import PoolCounts

if TYPE_CHECKING:
    from kvplug.offload.device_pool import DevicePool
    from kvplug.offload.hot_pool import HotPool


class Pools:
    """The pools of one worker.

    Args:
        pools: One for each retrieving layer.
    """

    def __init__(self, pools: Iterable[HotPool | DevicePool]) -> None:
        """Holds its argument."""
        self.pools = list(pools)

    @property
    def counts(self) -> PoolCounts:
        """Of all layers together."""
        return sum((pool.counts for pool in self.pools), PoolCounts())

    @property
    def nbytes(self) -> int:
        """Bytes of all slots and maps, and the most that was mapped of the store behind them."""
        mapped = max((pool.store.most_mapped for pool in self.pools), default=0)
        return mapped + sum(pool.nbytes() for pool in self.pools)

    def take_unreadable(self) -> set[int]:
        """Pages that any layer could not read since this was last asked."""
        found: set[int] = set()
        for pool in self.pools:
            found |= pool.take_unreadable()
        return found
