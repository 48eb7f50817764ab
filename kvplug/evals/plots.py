"""Plots of the lab as SVG, for pages that run no scripts; the HTML page draws the same with plotly.

:mod:`kvplug.evals.report` says what is plotted.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from kvplug.errors import KvplugError
from kvplug.evals.plan import STOCK
from kvplug.evals.summary import ALL, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (7.5, 4.2)
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False, "fontsize": 7}


def by_budget(rows: list[Row]) -> str:
    """Accuracy over all tasks against the share of tokens attended, with 95% intervals."""
    figure, axes = _figure()
    chosen = [row for row in rows if row.task == ALL]
    lines: dict[str, list[Row]] = {}
    for row in chosen:
        if row.setup != STOCK:
            lines.setdefault(f"{row.setup.split('@')[0]}, {row.context:,}", []).append(row)
    for name, line in lines.items():
        line.sort(key=lambda row: row.attended)
        values = [row.accuracy for row in line]
        spread = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
        axes.errorbar(
            [row.attended for row in line], [v.value for v in values], spread, label=name,
            marker="o", markersize=3, linewidth=1, elinewidth=0.6, capsize=2,
        )  # fmt: skip
    for row in chosen:
        if row.setup == STOCK:
            axes.axhline(row.accuracy.value, linestyle=":", color="grey", linewidth=1)
            axes.annotate(f"dense, {row.context:,}", (1, row.accuracy.value), fontsize=7,
                          ha="right", va="bottom")  # fmt: skip
    axes.set(xscale="log", xlabel="share of tokens attended", ylabel="accuracy, mean of all tasks",
             ylim=(0, 1.05))  # fmt: skip
    axes.legend(**BESIDE)
    return _svg(figure)


def pareto(rows: list[Row]) -> str:
    """What is left of dense accuracy against the speed-up of the first token."""
    figure, axes = _figure()
    chosen = [row for row in rows if row.task == ALL and row.kept and row.ttft_ratio]
    for context in sorted({row.context for row in chosen}):
        points = [
            (row.setup, row.ttft_ratio, row.kept.value)
            for row in chosen
            if row.context == context and row.ttft_ratio and row.kept
        ]
        faster, kept = [point[1] for point in points], [point[2] for point in points]
        axes.scatter(faster, kept, s=14, label=f"{context:,} tokens")
        for name, *place in points:
            axes.annotate(name, (place[0], place[1]), fontsize=6, xytext=(2, 2),
                          textcoords="offset points")  # fmt: skip
    axes.set(xlabel="first token sooner by", ylabel="accuracy, share of dense")
    axes.set_ylim(bottom=0)
    axes.legend(**BESIDE)
    return _svg(figure)


def _figure() -> tuple[object, Axes]:
    """An empty figure, without a window system.

    Raises:
        KvplugError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise KvplugError("The lab's plots need matplotlib: pip install 'kvplug[eval]'.") from None
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: object) -> str:
    """The figure as text; the same figure gives the same text."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "kvplug", "svg.fonttype": "none"}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
