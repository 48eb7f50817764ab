"""The lab's page: one self-contained HTML file, and the same as Markdown."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import TYPE_CHECKING

from kvplug.errors import KvplugError
from kvplug.evals.bootstrap import Interval
from kvplug.evals.plan import STOCK, Answer, Settings
from kvplug.evals.selector import Choice
from kvplug.evals.summary import ALL, Row

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from kvplug.evals.lab import Result

BINS = 10
"""Of depth, in heat maps."""
ERROR = Choice._fields.index("error")
STYLE = (
    "body{font-family:system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .6rem;text-align:right;"
    "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
)
COLUMNS = (
    "setup", "task", "context", "examples", "accuracy", "of dense", "attended", "first token",
    "decode", "same output", "first difference",
)  # fmt: skip

SELECTOR_COLUMNS = (
    "setup", "task", "context", "examples", "attended", "captured mass", "best possible",
    "best pages found", "output error",
)  # fmt: skip


def columns(settings: Settings) -> tuple[str, ...]:
    """What a row says: of answers, or of selections where those were measured."""
    return SELECTOR_COLUMNS if settings.selector else COLUMNS


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def cells(row: Row) -> list[str]:
    """A row as text, in the order of :func:`columns`."""
    if row.selection is not None:
        shares = (row.attended, row.selection.captured, row.selection.best, row.selection.found)
        return [
            row.setup, row.task, f"{row.context:,}", str(row.examples),
            *(f"{share:.1%}" for share in shares), f"{row.selection.error:.3f}",
        ]  # fmt: skip
    same = "-" if row.same_output is None else f"{row.same_output:.0%}"
    place = "-" if row.first_difference is None else f"token {row.first_difference:.0f}"
    return [
        row.setup, row.task, f"{row.context:,}", str(row.examples), _interval(row.accuracy),
        _interval(row.kept), f"{row.attended:.1%}", _times(row.ttft_ratio),
        _times(row.decode_ratio), same, place,
    ]  # fmt: skip


def markdown(settings: Settings, rows: Iterable[Row]) -> str:
    """Rows as a Markdown table."""
    head = columns(settings)
    lines = [head, ["---"] * len(head), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def document(results: list[Result], pictures: Mapping[str, list[str]], made_by: str) -> str:
    """A Markdown page: per model what was asked, plots, all tasks together, then every task.

    Args:
        results: Of each model.
        pictures: Model -> paths of its plots.
        made_by: The command.
    """
    minutes = sum(result.seconds for result in results) / 60
    head = (
        f"# What retrieval costs in answers\n\n"
        f"Made by `{made_by}` in {minutes:.0f} minutes. Every setup answers the same prompts, one "
        f"at a time. Intervals are 95%, by the bootstrap over examples; *of dense* is accuracy "
        f"over stock vLLM's on the same examples; *attended* is the share of the context that a "
        f"query of the answer attends to (a method of kvpress's keeps as many); speed-ups are "
        f"medians over examples, against stock vLLM.\n"
    )
    return head + "".join(
        _section(result, pictures.get(result.settings.model, [])) for result in results
    )


def _section(result: Result, pictures: list[str]) -> str:
    """One model, as Markdown."""
    settings, rows = result.settings, result.rows
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions.items())
    numbers = "words for numbers and UUIDs" if settings.plain else "keys and values as defined"
    images = "".join(f"![{settings.model}]({path})\n" for path in pictures)
    return (
        f"\n## {settings.model}\n\n"
        f"{settings.processor}, {settings.threads} threads, {versions}; pages of {settings.page}, "
        f"{settings.chunk:,} prompt tokens a step, haystack {settings.haystack}, {numbers}.\n\n"
        f"{images}\n"
        f"### All tasks together\n\n"
        f"{markdown(settings, [row for row in rows if row.task == ALL])}\n"
        f"### Task by task\n\n"
        f"{markdown(settings, [row for row in rows if row.task != ALL])}"
    )


def page(results: list[Result]) -> str:
    """The HTML page.

    Raises:
        KvplugError: plotly is not installed.
    """
    try:
        import plotly.offline
    except ImportError:
        raise KvplugError("The lab's page needs plotly: pip install 'kvplug[eval]'.") from None
    title = f"kvplug eval: {html.escape(', '.join(r.settings.model for r in results))}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style><script>{plotly.offline.get_plotlyjs()}</script><h1>{title}</h1>"
        f"<p>Paired questions; intervals are 95%, by the bootstrap over examples. Speed-ups are "
        f"medians over examples, one request at a time.</p>"
        f"{''.join(map(_html_section, results))}</html>"
    )


def _html_section(result: Result) -> str:
    """One model, as HTML: plots, then all rows."""
    import plotly.io

    settings, rows, answers = result.settings, result.rows, result.answers
    figures = (
        layer_maps(answers)
        if settings.selector
        else [by_budget(rows), pareto(rows), *heat_maps(answers)]
    )
    parts = [
        plotly.io.to_html(figure, full_html=False, include_plotlyjs=False) for figure in figures
    ]
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions.items())
    head = "".join(f"<th>{column}</th>" for column in columns(settings))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>"
        for row in rows
    )
    return (
        f"<h2>{html.escape(settings.model)}</h2>"
        f"<p>{html.escape(settings.processor)}, {settings.threads} threads, "
        f"{html.escape(versions)}.</p>{''.join(parts)}<table><tr>{head}</tr>{body}</table>"
    )


def _figure(title: str, x: str, y: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", height=460
    )
    return figure


def by_budget(rows: list[Row]) -> go.Figure:
    """Accuracy over all tasks against the share of tokens attended."""
    figure = _figure("Accuracy against budget", "tokens attended", "accuracy, mean of all tasks")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.task == ALL and row.setup != STOCK:
            lines.setdefault(f"{row.setup.split('@')[0]}, {row.context:,}", []).append(row)
    for name, line in lines.items():
        line.sort(key=lambda row: row.attended)
        values = [row.accuracy for row in line]
        figure.add_scatter(
            x=[row.attended for row in line], y=[v.value for v in values], name=name,
            mode="lines+markers", text=[row.setup for row in line],
            error_y={
                "type": "data", "symmetric": False, "array": [v.high - v.value for v in values],
                "arrayminus": [v.value - v.low for v in values],
            },
        )  # fmt: skip
    for row in rows:
        if row.task == ALL and row.setup == STOCK:
            figure.add_hline(y=row.accuracy.value, line_dash="dot",
                             annotation_text=f"dense, {row.context:,}")  # fmt: skip
    figure.update_xaxes(tickformat=".1%", type="log")
    figure.update_yaxes(tickformat=".0%", range=[0, 1.05])
    return figure


def pareto(rows: list[Row]) -> go.Figure:
    """What is left of dense accuracy against the speed-up of the first token."""
    figure = _figure("What a speed-up costs", "first token sooner by", "accuracy, share of dense")
    chosen = [row for row in rows if row.task == ALL and row.kept and row.ttft_ratio]
    for context in sorted({row.context for row in chosen}):
        mine = [row for row in chosen if row.context == context]
        figure.add_scatter(
            x=[row.ttft_ratio for row in mine], y=[row.kept.value for row in mine if row.kept],
            text=[row.setup for row in mine], mode="markers+text", textposition="top center",
            name=f"{context:,} tokens",
        )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return figure


def heat_maps(answers: list[Answer]) -> list[go.Figure]:
    """Depth x length for every setup, over the tasks whose evidence has a place."""
    figures = []
    placed = [answer for answer in answers if answer.depth is not None]
    contexts = sorted({answer.context for answer in placed})
    for setup in dict.fromkeys(answer.setup for answer in placed):
        sums: dict[tuple[int, int], list[float]] = {}
        for answer in placed:
            if answer.setup == setup and answer.depth is not None:
                place = min(int(answer.depth * BINS), BINS - 1)
                sums.setdefault((place, answer.context), []).append(answer.score)
        grid = [
            [
                sum(found) / len(found) if (found := sums.get((place, context))) else None
                for context in contexts
            ]
            for place in range(BINS)
        ]
        figure = _figure(f"{setup}: accuracy by place and length", "tokens", "depth")
        figure.add_heatmap(
            z=grid, x=[f"{context:,}" for context in contexts],
            y=[f"{place / BINS:.0%}" for place in range(BINS)], zmin=0, zmax=1,
            colorscale="RdYlGn",
        )  # fmt: skip
        figures.append(figure)
    return figures


def layer_maps(answers: list[Answer]) -> list[go.Figure]:
    """Layer x KV head: error of the output, the mean of all examples of a setup and length."""
    figures = []
    measured = [answer for answer in answers if answer.choices]
    for setup, context in dict.fromkeys((answer.setup, answer.context) for answer in measured):
        mine = [a.choices for a in measured if (a.setup, a.context) == (setup, context)]
        grid = [
            [fmean(example[layer][head][ERROR] for example in mine) for head in range(len(heads))]
            for layer, heads in enumerate(mine[0])
        ]
        figure = _figure(f"{setup}, {context:,} tokens: output error", "KV head", "layer")
        figure.add_heatmap(z=grid, zmin=0, zmax=1, colorscale="RdYlGn_r")
        figures.append(figure)
    return figures
