"""Counters of hot pools and tiers, for Prometheus."""

from __future__ import annotations

from kvplug.observe.counters import Counters, Metric
from kvplug.offload.ahead import KINDS

AHEAD = "Pages of KV heads that were read ahead of need."
USED = "Pages of KV heads that were read ahead and used before they gave way."
METRICS = (
    Metric("kvplug:pool_hits", "hits", "Pages of KV heads that were hot when attention asked."),
    Metric("kvplug:pool_misses", "misses", "Pages of KV heads that were copied into the hot pool."),
    Metric("kvplug:pool_evictions", "evictions", "Pages of KV heads that left the hot pool."),
    Metric("kvplug:cold_read_bytes", "bytes_read", "Bytes copied from the cold store."),
    Metric("kvplug:cold_written_bytes", "bytes_written", "Bytes of new keys and values."),
    Metric("kvplug:cold_read_failures", "failed", "Pages of KV heads that could not be read."),
    Metric("kvplug:pool_turns", "turns", "Calls of attention through the hot pool."),
    Metric("kvplug:pool_stall_seconds", "stall_s", "Seconds that attention waited for pages."),
    *(
        Metric("kvplug:prefetched_pages", f"prefetched_{kind}", AHEAD, {"kind": kind})
        for kind in KINDS
    ),
    *(
        Metric("kvplug:prefetch_hits", f"prefetch_hits_{kind}", USED, {"kind": kind})
        for kind in KINDS
    ),
)


def pool_metrics(tier: str) -> Counters:
    """The counters of one process's pools.

    Args:
        tier: Label of the cold store, ``host`` or ``disk``.
    """
    return Counters(METRICS, tier=tier)
