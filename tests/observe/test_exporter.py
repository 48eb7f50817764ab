"""Counts reach Prometheus by themselves, each once, for as long as somebody counts."""

from __future__ import annotations

import gc
import time
from types import SimpleNamespace

from prometheus_client import REGISTRY

from kvplug.observe.counters import Counters, Metric
from kvplug.observe.exporter import Exporter

METRICS = (
    Metric("kvplug_test:things", "new", "Things.", {"kind": "new"}),
    Metric("kvplug_test:things", "old", "", {"kind": "old"}),
)


class Source:
    def __init__(self, new: int, old: int) -> None:
        self.counts = SimpleNamespace(new=new, old=old)


def value(kind: str) -> float:
    return REGISTRY.get_sample_value("kvplug_test:things_total", {"kind": kind}) or 0.0


def test_sources_add_up_and_go() -> None:
    exporter, first, second = Exporter(), Source(3, 0), Source(4, 5)
    before = value("new"), value("old")
    for source in (first, second):
        exporter.add(source, Counters(METRICS))
    exporter.tell()
    exporter.tell()
    assert (value("new") - before[0], value("old") - before[1]) == (7, 5)
    first.counts.new += 1
    deadline = time.monotonic() + 20
    while value("new") - before[0] < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert value("new") - before[0] == 8, "nobody asked, the thread did"
    del first, second, source
    gc.collect()
    while exporter._thread is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert exporter._thread is None
