"""Counters say what pools counted, each thing once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from prometheus_client import REGISTRY

from kvplug.observe.pool_metrics import METRICS, pool_metrics
from kvplug.observe.share import VARIABLE
from kvplug.offload.counts import PoolCounts
from kvplug.offload.pools import Pools


def value(name: str) -> float:
    return REGISTRY.get_sample_value(f"{name}_total", {"tier": "disk"}) or 0.0


def test_every_count_is_exported() -> None:
    assert sorted(metric.field for metric in METRICS) == sorted(f.name for f in fields(PoolCounts))


def test_what_is_new_is_added() -> None:
    metrics, before = pool_metrics("disk"), {each.name: value(each.name) for each in METRICS}
    counts = PoolCounts(hits=5, misses=2, bytes_read=2048, stall_s=0.5)
    metrics.tell(counts)
    metrics.tell(counts)
    metrics.tell(replace(counts, hits=9))
    new = {each.field: value(each.name) - before[each.name] for each in METRICS}
    assert new["hits"] == 9
    assert new["misses"] == 2
    assert new["bytes_read"] == 2048
    assert new["stall_s"] == pytest.approx(0.5)
    assert new["evictions"] == 0


def test_pages_read_ahead_are_told_by_kind() -> None:
    def told(name: str, kind: str) -> float:
        labels = {"tier": "disk", "kind": kind}
        return REGISTRY.get_sample_value(f"kvplug:{name}_total", labels) or 0.0

    metrics = pool_metrics("disk")
    before = told("prefetched_pages", "events"), told("prefetch_hits", "events")
    metrics.tell(PoolCounts(prefetched_events=5, prefetch_hits_events=3, prefetched_last=1))
    assert told("prefetched_pages", "events") == before[0] + 5
    assert told("prefetch_hits", "events") == before[1] + 3


def test_layers_are_added_up() -> None:
    class Pool:
        def __init__(self, counts: PoolCounts, lost: set[int]) -> None:
            self.counts, self.unreadable = counts, lost

        def take_unreadable(self) -> set[int]:
            found, self.unreadable = self.unreadable, set()
            return found

    layers = [Pool(PoolCounts(hits=1, turns=2), {3}), Pool(PoolCounts(hits=4), {5, 3})]
    pools = Pools(layers)  # type: ignore[arg-type]
    assert pools.counts == PoolCounts(hits=5, turns=2)
    assert pools.take_unreadable() == {3, 5}
    assert pools.take_unreadable() == set()


def test_other_processes_are_counted_and_the_folder_goes() -> None:
    """As a worker's counters reach the process that serves ``/metrics``."""
    code = """
import os, subprocess, sys
from kvplug.observe.share import VARIABLE, share_metrics
share_metrics()
work = "from prometheus_client import Counter; Counter('kvplug:x', 'y').inc(7)"
subprocess.run([sys.executable, "-c", work], check=True)
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
print("folder", os.environ[VARIABLE])
"""
    environment = {name: text for name, text in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "kvplug:x_total 7.0" in done.stdout
    folder = done.stdout.split("folder ")[1].strip()
    assert not os.path.exists(folder)
