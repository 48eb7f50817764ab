"""Counts that code keeps as plain numbers, as counters of Prometheus."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import Counter


@dataclasses.dataclass(frozen=True)
class Metric:
    """One exported counter."""

    name: str
    """Without ``_total``, which Prometheus adds."""
    field: str
    """The attribute of what is counted."""
    text: str
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Labels that are the same for the whole process."""


class Counters:
    """What one source counts.

    Args:
        metrics: One for each of its numbers.
        labels: Further labels of all of them.
    """

    _registered: dict[str, Counter] = {}  # noqa: RUF012 (a process has one registry)

    def __init__(self, metrics: Sequence[Metric], **labels: str) -> None:
        """Registers the counters, once a process; they stand at 0 until something is told."""
        self._told: dict[str, float] = {}
        self._mine: dict[str, Any] = {}
        for metric in metrics:
            every = {**labels, **metric.labels}
            if metric.name not in self._registered:
                self._registered[metric.name] = Counter(metric.name, metric.text, list(every))
            counter = self._registered[metric.name]
            self._mine[metric.field] = counter.labels(**every) if every else counter

    def tell(self, counts: object) -> None:
        """Adds what came since the last time.

        Args:
            counts: Has the metrics' fields as attributes, since it was made.
        """
        for name, counter in self._mine.items():
            now = getattr(counts, name)
            new = now - self._told.get(name, 0)
            if new:
                counter.inc(new)
            self._told[name] = now
