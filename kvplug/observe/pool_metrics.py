"""Counters of hot pools and tiers, for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter

from kvplug.offload.hot_pool import PoolCounts


@dataclass(frozen=True)
class Metric:
    """One exported counter."""

    name: str
    """Without ``_total``, which Prometheus adds."""
    field: str
    """Of :class:`PoolCounts`."""
    text: str


METRICS = (
    Metric("kvplug:pool_hits", "hits", "Pages of KV heads that were hot when attention asked."),
    Metric("kvplug:pool_misses", "misses", "Pages of KV heads that were copied into the hot pool."),
    Metric("kvplug:pool_evictions", "evictions", "Pages of KV heads that left the hot pool."),
    Metric("kvplug:cold_read_bytes", "bytes_read", "Bytes copied from the cold store."),
    Metric("kvplug:cold_written_bytes", "bytes_written", "Bytes of new keys and values."),
    Metric("kvplug:cold_read_failures", "failed", "Pages of KV heads that could not be read."),
    Metric("kvplug:pool_turns", "turns", "Calls of attention through the hot pool."),
    Metric("kvplug:pool_stall_seconds", "stall_s", "Seconds that attention waited for pages."),
)


class PoolMetrics:
    """One process's counters.

    Args:
        tier: Label of the cold store, ``host`` or ``disk``.
    """

    _counters: dict[str, Counter] = {}  # noqa: RUF012 (a process has one registry)

    def __init__(self, tier: str) -> None:
        """Registers the counters, once a process."""
        if not self._counters:
            for metric in METRICS:
                self._counters[metric.field] = Counter(metric.name, metric.text, ["tier"])
        self._mine = {name: each.labels(tier) for name, each in self._counters.items()}
        self._told = PoolCounts()

    def tell(self, counts: PoolCounts) -> None:
        """Adds what came since the last time.

        Args:
            counts: Of all the process's pools together, since they were made.
        """
        for name, counter in self._mine.items():
            new = getattr(counts, name) - getattr(self._told, name)
            if new:
                counter.inc(new)
        self._told = counts
