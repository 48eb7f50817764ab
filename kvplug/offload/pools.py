"""All hot pools of a worker: what they lost, and what they count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvplug.offload.hot_pool import HotPool, PoolCounts

STEPS = 8
"""Steps between two times that counts are told: counting 32 layers takes as long as attending."""


class Pools:
    """The pools of one worker.

    Args:
        pools: One for each retrieving layer.
        metrics: Told what they count, ``tell(counts)``; None to tell nobody.
    """

    def __init__(self, pools: Iterable[HotPool], metrics: Any = None) -> None:
        """Holds its arguments."""
        self.pools, self._metrics, self._step = list(pools), metrics, 0

    @property
    def counts(self) -> PoolCounts:
        """Of all layers together."""
        return sum((pool.counts for pool in self.pools), PoolCounts())

    def take_unreadable(self) -> set[int]:
        """Pages that any layer could not read since this was last asked."""
        found: set[int] = set()
        for pool in self.pools:
            if pool.unreadable:
                found |= pool.take_unreadable()
        return found

    def step_done(self) -> None:
        """Tells counts, now and then."""
        self._step += 1
        if self._metrics is not None and self._step % STEPS == 0:
            self._metrics.tell(self.counts)
