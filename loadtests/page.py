"""The report as one HTML file that needs nothing else: no scripts, no network, prints well."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from kvplug.evals.bootstrap import Interval
from kvplug.loadtests.page_charts import charts, panels
from kvplug.loadtests.records import Record
from kvplug.loadtests.report import Report
from kvplug.loadtests.summary import SHARES, Summary

STYLE = """
:root{--ink:#1b1f24;--paper:#fff;--soft:#d8dee4;--ok:#0a6b3d;--bad:#b3261e;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#8a6d00;--c5:#56b4e9}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--paper:#15181c;--soft:#3a4048;
--ok:#5fd39a;--bad:#ff8a80;--c0:#4ea8de;--c1:#ff9f5a;--c2:#3ddc97;--c3:#e8a5cb;--c4:#e0c050}}
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:74rem;padding:0 1rem;
color:var(--ink);background:var(--paper)}
table{border-collapse:collapse;margin:.6rem 0 1.4rem;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid var(--soft)}
td{white-space:nowrap}.left td{white-space:normal}
td:first-child,th:first-child,.two td:nth-child(2),.two th:nth-child(2),.left td,.left th{
text-align:left}
.ok{color:var(--ok)}.bad{color:var(--bad);font-weight:600}
.banner{border-left:6px solid var(--bad);padding:.6rem 1rem;background:#b3261e1a}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:1rem}
figure{margin:0;break-inside:avoid}figcaption{font-weight:600}.keys{margin:.2rem 0}
svg{width:100%;height:auto}svg text{fill:var(--ink);font-size:11px}.grid{stroke:var(--soft)}
.line{fill:none;stroke-width:1.8}.ring{fill:none;stroke:var(--bad);stroke-width:2}
.key{margin-right:1rem;border-bottom:3px solid}.scroll{overflow-x:auto}
""" + "".join(
    f".line.c{i}{{stroke:var(--c{i})}}.dot.c{i}{{fill:var(--c{i})}}"
    f".key.c{i}{{border-color:var(--c{i})}}"
    for i in range(6)
)
EXAMPLES = 3
"""Of what a server said, for each kind of failure."""


def page(report: Report, records: Sequence[Record], samples: Sequence[dict[str, Any]]) -> str:
    """The page.

    Args:
        report: What there is to say.
        records: Every request.
        samples: What was sampled beside them.
    """
    title = f"kvplug load: {', '.join(report.run.setups)}"
    parts = [
        _banners(report), _trust(report), _pairs(report), _totals(report), _knees(report),
        _section("Distributions", f"<div class=charts>{charts(report, records)}</div>"),
        _percentiles(report.summaries), _failures(records), _foreign(report),
        _kv(report, samples), _environment(report),
    ]  # fmt: skip
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>"
    )


def _section(title: str, body: str, words: str = "") -> str:
    told = f"<p>{html.escape(words)}</p>" if words else ""
    return f"<h2>{html.escape(title)}</h2>{told}{body}" if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """A table.

    Args:
        head: Names of columns.
        rows: Cells; those of :class:`Markup` are taken as they are.
        kind: ``two``: words in the second column as in the first; ``left``: in all.
    """
    lines = ["<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    if not lines:
        return ""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class=scroll><table class="{kind}"><tr>{top}</tr>{"".join(lines)}</table></div>'


class Markup(str):
    """Text that is HTML already."""


def _cell(cell: object) -> str:
    return cell if isinstance(cell, Markup) else html.escape(str(cell))


def _banners(report: Report) -> str:
    """What must not be overlooked."""
    told = []
    if report.run.is_partial:
        reasons = [f"{name}: {why}" if name else why for name, why in report.run.troubles.items()]
        told.append(
            "Partial: not everything was asked. "
            + ("; ".join(reasons) or "The run did not end by itself.")
        )
    if not report.is_believable:
        bad = [f"{c.setup} {c.name}: {c.found}" for c in report.checks if not c.is_fine]
        told.append("The client is not believable here. " + "; ".join(bad))
    return "".join(f"<p class=banner><b>{html.escape(text)}</b></p>" for text in told)


def _trust(report: Report) -> str:
    """The first panel."""
    rows = [
        (check.setup or "client", check.name, check.found, check.limit or "told only",
         Markup('<span class="ok">yes</span>' if check.is_fine else '<span class="bad">no</span>'))
        for check in report.checks
    ]  # fmt: skip
    return _section(
        "Can the client be believed?",
        table(("about", "what", "found", "limit", "fine"), rows, "two"),
        "Errors are the client's times less the known delays of a fake server, measured before "
        "the run by the same client processes.",
    )  # fmt: skip


def _totals(report: Report) -> str:
    head = (
        "server", "load", "requests", "failed", "right", "seconds", "requests/s", "output tok/s",
        "input tok/s", "good", "goodput/s", "cached",
    )  # fmt: skip
    rows = [
        (
            s.setup, s.scope, s.requests, sum(s.errors.values()),
            f"{s.right} of {s.checked}" if s.checked else "-", f"{s.seconds:.1f}",
            f"{s.requests_per_s:.3f}", f"{s.output_tok_s:.1f}", f"{s.input_tok_s:.0f}",
            interval(s.good, 100, "%"), f"{s.goodput_per_s:.3f}",
            "-" if s.cached is None else f"{s.cached:.1%}",
        )
        for s in report.summaries
    ]  # fmt: skip
    settings = report.run.settings
    unit = "users" if settings.loop == "closed" else f"requests/s, {settings.process} arrivals"
    return _section(
        "Throughput and goodput", table(head, rows, "two"),
        f"{settings.loop} loop, shape {settings.shape}, levels "
        f"{', '.join(f'{level:g}' for level in settings.levels)} {unit}, workload "
        f"{settings.workload}, lengths {settings.lengths}. Good requests: "
        f"{report.run.slo}. Failed requests count in no rate.",
    )  # fmt: skip


def _pairs(report: Report) -> str:
    rows = [
        (
            f"{p.setup} over {p.base}", p.requests, interval(p.ttft, 1, "x"),
            interval(p.gap, 1, "x"), interval(p.total, 1, "x"),
            "-" if p.output_ratio is None else f"{p.output_ratio:.2f}x",
            f"{p.same_text} of {p.requests}", f"{p.right} and {p.base_right} of {p.checked}",
        )
        for p in report.pairs
    ]  # fmt: skip
    head = ("", "pairs", "first token", "between tokens", "total", "output tok/s", "same text",
            "right: it, and the other")  # fmt: skip
    return _section(
        "The same prompts, one by one", table(head, rows),
        "Medians over requests of the other's time divided by its own; above 1, it is faster.",
    )  # fmt: skip


def interval(found: Interval | None, scale: float, unit: str) -> str:
    """A value and its interval."""
    if found is None:
        return "-"
    value, low, high = (digits(scale * part) for part in found)
    return f"{value}{unit} ({low} to {high})"


def digits(number: float) -> str:
    """Three digits that say something, never a power of ten."""
    return f"{number:,.0f}" if abs(number) >= 999.5 else f"{number:.3g}"


def _percentiles(summaries: Sequence[Summary]) -> str:
    """All four times."""
    parts = []
    for title, words, name, scale, unit in (
        ("First token, from the intended time", "Queueing in the client or before the server "
         "accepts counts.", "ttft", 1, " s"),
        ("First token, from sending", "", "ttft_sent", 1, " s"),
        ("Between pieces of text", "Pieces are single tokens where the table below says so.",
         "gap", 1000, " ms"),
        ("Whole request, from the intended time", "", "total", 1, " s"),
    ):  # fmt: skip
        rows = [
            (s.setup, s.scope,
             *(interval(getattr(s, name).get(share), scale, unit) for share in SHARES))
            for s in summaries
        ]  # fmt: skip
        parts.append(_section(title, table(("server", "load", *SHARES), rows, "two"), words))
    rows = [(s.setup, s.scope, f"{s.token_by_token:.1%}", f"{s.zero_gaps:.1%}") for s in summaries]
    head = ("server", "load", "requests whose pieces are tokens", "gaps of nothing")
    return "".join(parts) + table(head, rows, "two")


def _knees(report: Report) -> str:
    rows = [
        (name, f"{k.load:g}", f"{k.low:g} to {k.high:g}",
         "not in this sweep" if k.fails_at is None else f"{k.fails_at:g}")
        for name, k in report.knees.items()
    ]  # fmt: skip
    return _section(
        "Knee", table(("server", "sustains", "95% interval", "fails at"), rows),
        f"The highest load at which, and at every lower one, {report.run.slo.share:.0%} of "
        f"requests are good. Only loads of the sweep are tried.",
    )  # fmt: skip


def _failures(records: Sequence[Record]) -> str:
    kinds = Counter((r.setup, r.error) for r in records if r.error is not None)
    rows = []
    for (setup, kind), count in kinds.most_common():
        mine = [r for r in records if r.setup == setup and r.error == kind]
        said = dict.fromkeys(r.detail for r in mine if r.detail)
        partial = sum(r.first is not None for r in mine)
        rows.append((setup, kind, count, partial, " | ".join([*said][:EXAMPLES])))
    head = ("server", "failure", "requests", "of them with some text", "in its words")
    return _section("Failures", table(head, rows, "left"))


def _foreign(report: Report) -> str:
    rows = [
        (
            f.label, ", ".join(f"{name} {value}" for name, value in f.load.items()), f.requests,
            "-" if f.failed is None else f.failed, f"{f.requests_per_s:.3f}",
            f"{f.output_tok_s:.1f}", *(_seconds(f.ttft.get(name)) for name in ("p50", "p99")),
            *(_seconds(f.gap.get(name)) for name in ("p50", "p99")),
            *(_seconds(f.total.get(name)) for name in ("p50", "p99")),
        )
        for f in report.foreign
    ]  # fmt: skip
    head = (
        "file", "asked for", "requests", "failed", "requests/s", "output tok/s", "first token p50",
        "p99", "gap p50", "p99", "total p50", "p99",
    )  # fmt: skip
    return _section(
        "Beside it: vllm bench serve", table(head, rows),
        "Its times count from sending. Prompts and load are its own, not those above.",
    )  # fmt: skip


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f} s"


def _kv(report: Report, samples: Sequence[dict[str, Any]]) -> str:
    drawn = panels(report, samples)
    return _section(
        "What the servers say of themselves", f"<div class=charts>{drawn}</div>" if drawn else "",
        "From their /metrics, by seconds since a server's first phase began. Counters are drawn "
        "from what they held then.",
    )  # fmt: skip


def _environment(report: Report) -> str:
    told = {**report.run.environment, **report.run.settings.to_json()}
    rows = [
        (name, "; ".join(f"{k} {v}" for k, v in value.items()))
        if isinstance(value, dict)
        else (name, value)
        for name, value in told.items()
    ]
    return _section("Environment", table(("what", "value"), rows, "left"))
