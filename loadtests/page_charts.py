"""Which charts a report has: distributions, a sweep, a run over time, the servers' own figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvplug.loadtests.chart import Line, chart, distribution
from kvplug.loadtests.records import Record
from kvplug.loadtests.report import Report
from kvplug.loadtests.summary import Summary

Quantity = Callable[[Record], Sequence[float | None]]
QUANTITIES: dict[str, tuple[str, Quantity]] = {
    "First token, from the intended time": ("s", lambda r: [r.ttft]),
    "Between pieces of text": ("s", lambda r: r.gaps),
    "Whole request, from the intended time": ("s", lambda r: [r.total]),
}
NOT_SAMPLES = {"kind", "setup", "clock"}


def charts(report: Report, records: Sequence[Record]) -> str:
    """Charts of the requests."""
    setups = report.run.setups
    fine = [record for record in records if record.error is None]
    parts = []
    for title, (unit, of) in QUANTITIES.items():
        drawn = [
            Line(s, distribution(_values(of, [r for r in fine if r.setup == s])), order=i)
            for i, s in enumerate(setups)
        ]
        parts.append(chart(title, unit, "share of requests", drawn))
    over_time = [
        Line(s, [(r.intended, r.ttft) for r in fine if r.setup == s and r.ttft is not None],
             dots=True, order=i)
        for i, s in enumerate(setups)
    ]  # fmt: skip
    parts.append(chart("First token by intended time", "s since its phase began", "s", over_time))
    return "".join(parts) + _sweep(report)


def _values(of: Quantity, records: Sequence[Record]) -> list[float]:
    return [value for record in records for value in of(record) if value is not None]


def _sweep(report: Report) -> str:
    """Goodput, throughput and first tokens by load."""
    if report.run.settings.shape != "sweep":
        return ""
    unit = "users" if report.run.settings.loop == "closed" else "requests per s"
    by_setup = {
        s: [(float(p.scope.split()[1]), p) for p in report.summaries if _is_load(p, s)]
        for s in report.run.setups
    }
    goodput, firsts, knees = [], [], []
    for order, (setup, parts) in enumerate(by_setup.items()):
        points = [(load, part.goodput_per_s) for load, part in parts]
        goodput.append(Line(setup, points, order=order))
        middle = [(load, part.ttft["p50"]) for load, part in parts if part.ttft]
        firsts.append(
            Line(setup, [(load, found.value) for load, found in middle],
                 [(load, found.low, found.high) for load, found in middle], order=order)
        )  # fmt: skip
        found = report.knees.get(setup)
        knees += [point for point in points if found is not None and point[0] == found.load]
    return chart("Goodput; rings are knees", unit, "good requests per s", goodput, knees) + chart(
        "Median first token, from the intended time", unit, "s", firsts
    )


def _is_load(part: Summary, setup: str) -> bool:
    return part.setup == setup and part.scope.startswith("load ")


def panels(report: Report, samples: Sequence[dict[str, Any]]) -> str:
    """A chart for every metric that a server gave and that moved."""
    looks = [sample for sample in samples if sample["kind"] == "server"]
    names = sorted({name for look in looks for name in look} - NOT_SAMPLES)
    begun: dict[str, float] = {}
    for sample in samples:
        if sample["kind"] == "phase":
            begun.setdefault(sample["setup"], sample["clock"])
    parts = []
    for name in names:
        drawn = []
        for order, setup in enumerate(report.run.setups):
            mine = [look for look in looks if look["setup"] == setup and name in look]
            zero = begun.get(setup, mine[0]["clock"] if mine else 0.0)
            # What a counter held before does not belong to the run.
            base = mine[0][name] if mine and name.endswith(("_total", "_sum", "_count")) else 0.0
            points = [(look["clock"] - zero, look[name] - base) for look in mine]
            drawn.append(Line(setup, [p for p in points if p[0] >= 0], order=order))
        if any(value for line in drawn for _, value in line.points):
            parts.append(chart(name, "s", "", drawn))
    return "".join(parts)
