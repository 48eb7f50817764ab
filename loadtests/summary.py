"""Figures of requests that belong together: those of one server, one load, or one kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvplug.evals.bootstrap import Interval, mean
from kvplug.loadtests.intervals import quantiles
from kvplug.loadtests.records import Record
from kvplug.loadtests.slo import Slo

SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
ALL = "all"
Percentiles = dict[str, Interval]
"""Name of SHARES -> seconds. Those that so few requests cannot tell are left out."""


@dataclass(frozen=True)
class Summary:
    """What a group of requests says."""

    setup: str
    scope: str
    """ALL, a load, or a kind of request."""
    requests: int
    errors: dict[str, int]
    """Kind -> requests that failed so."""
    checked: int
    """Requests that succeeded and had something to be right about."""
    right: int
    seconds: float
    """From the first intended time to the last end, phase by phase."""
    requests_per_s: float
    """That succeeded."""
    output_tok_s: float
    """Of requests that succeeded, as the server counted them."""
    input_tok_s: float
    goodput_per_s: float
    """Requests per second that kept every limit."""
    good: Interval
    """Their share of all that were sent."""
    ttft: Percentiles
    """From the intended time."""
    ttft_sent: Percentiles
    """From sending."""
    gap: Percentiles
    """Single gaps between pieces of text."""
    total: Percentiles
    """From the intended time to the last byte."""
    token_by_token: float
    """Share of requests whose pieces of text were single tokens."""
    zero_gaps: float
    """Share of gaps that are none: several pieces in one read."""
    cached: float | None
    """Share of prompt tokens that the server's prefix cache had; None: it does not say."""


def summarise(setup: str, scope: str, records: Sequence[Record], slo: Slo) -> Summary:
    """The figures of some requests.

    Args:
        setup: Whose they are.
        scope: What they have in common.
        records: At least one.
        slo: Limits of a good request.
    """
    fine = [record for record in records if record.error is None]
    checked = [record.right for record in fine if record.right is not None]
    good = [slo.is_good(record) for record in records]
    seconds = max(span(records), 1e-9)
    gaps = [gap for record in fine for gap in record.gaps]
    return Summary(
        setup, scope, len(records),
        dict(Counter(record.error for record in records if record.error is not None)),
        len(checked), sum(checked), seconds, len(fine) / seconds,
        sum(record.completion_tokens or 0 for record in fine) / seconds,
        sum(record.prompt_tokens or 0 for record in fine) / seconds,
        sum(good) / seconds, mean([float(is_good) for is_good in good]),
        percentiles([r.ttft] for r in fine), percentiles([r.ttft_sent] for r in fine),
        percentiles(r.gaps for r in fine), percentiles([r.total] for r in fine),
        sum(record.is_token_by_token for record in fine) / max(len(fine), 1),
        sum(gap == 0 for gap in gaps) / max(len(gaps), 1), _cached(fine),
    )  # fmt: skip


def percentiles(groups: Iterable[Sequence[float | None]]) -> Percentiles:
    """Quantiles that enough requests stand behind: of n, one at least lies beyond each."""
    kept = [[value for value in group if value is not None] for group in groups]
    count = sum(bool(group) for group in kept)
    names = [name for name, share in SHARES.items() if share == 0.5 or count * (1 - share) > 0.999]
    return dict(zip(names, quantiles(kept, [SHARES[name] for name in names]), strict=False))


def span(records: Iterable[Record]) -> float:
    """Seconds of the phases that the requests are in, each from its first to its last."""
    ends: dict[int, tuple[float, float]] = {}
    for record in records:
        first, last = ends.get(record.phase, (record.intended, record.end))
        ends[record.phase] = (min(first, record.intended), max(last, record.end))
    return sum(last - first for first, last in ends.values())


def _cached(records: Sequence[Record]) -> float | None:
    told = [r for r in records if r.cached_tokens is not None and r.prompt_tokens]
    prompts = sum(record.prompt_tokens or 0 for record in told)
    return sum(record.cached_tokens or 0 for record in told) / prompts if prompts else None
