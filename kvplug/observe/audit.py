"""Audit: what share of exact attention a selection captured, on a sample of windows.

No judge is needed and no answer is changed: beside what an audited window does, its last query
attends to everything, and the histograms say how much of that fell on the pages that were selected,
and how much would have fallen on the best as many.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Histogram

if TYPE_CHECKING:
    import torch

    from kvplug.observe.mass_meter import MassMeter
    from kvplug.pipeline import Plan
    from kvplug.step import Step

BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
CAPTURED, BEST, SECONDS = (
    "kvplug:audit_captured_mass",
    "kvplug:audit_best_mass",
    "kvplug:audit_seconds",
)
TEXTS = {
    CAPTURED: "Share of exact attention on the pages that an audited window attended to.",
    BEST: "Share of exact attention on the best pages, as many per KV head.",
    SECONDS: "Seconds that audits took.",
}


class Sampler:
    """Which sparse windows are audited: the same in every layer, spread evenly.

    Args:
        fraction: Of all sparse windows, in (0, 1].
    """

    def __init__(self, fraction: float) -> None:
        """Starts counting."""
        self.fraction = fraction
        self._seen = 0
        self._step: Step | None = None
        self._chosen: list[int] = []

    def choose(self, step: Step) -> list[int]:
        """Numbers of the windows of a step to audit; the layers of a step get the same."""
        if step is not self._step:
            before = self._seen
            self._seen += len(step.sparse_windows)
            due = [int((before + i) * self.fraction) for i in range(self._seen - before + 1)]
            self._step = step
            self._chosen = [
                int(s) for i, s in enumerate(step.sparse_windows) if due[i + 1] > due[i]
            ]
        return self._chosen


class LayerAudit:
    """One layer's ``observer``.

    Args:
        meter: Measures the layer.
        sampler: Says which windows; all layers share it.
        layer: Its number in the model.
    """

    _registered: dict[str, Any] = {}  # noqa: RUF012 (a process has one registry)

    def __init__(self, meter: MassMeter, sampler: Sampler, layer: int) -> None:
        """Registers the histograms, once a process."""
        if not self._registered:
            for name in (CAPTURED, BEST):
                self._registered[name] = Histogram(name, TEXTS[name], ["layer"], buckets=BUCKETS)
            self._registered[SECONDS] = Counter(SECONDS, TEXTS[SECONDS])
        self._meter, self._sampler = meter, sampler
        self._captured = self._registered[CAPTURED].labels(str(layer))
        self._best = self._registered[BEST].labels(str(layer))
        self._seconds = self._registered[SECONDS]

    def __call__(self, queries: torch.Tensor, plan: Plan) -> None:
        """Audits the step's share of the sample.

        Args:
            queries: ``[T, H, D]`` of the step.
            plan: The step's, with the layer's pages selected.
        """
        chosen = self._sampler.choose(plan.step)
        if not chosen:
            return
        assert plan.table is not None
        began = time.perf_counter()
        for s in chosen:
            mass = self._meter.window(queries, plan.table, s)
            # Sums of shares may come out a bit above 1, which would be behind the last bucket.
            self._captured.observe(min(mass.captured, 1.0))
            self._best.observe(min(mass.best, 1.0))
        self._seconds.inc(time.perf_counter() - began)
