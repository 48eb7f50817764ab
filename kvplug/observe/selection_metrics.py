"""Counters of what was selected, for Prometheus."""

from __future__ import annotations

from kvplug.observe.counters import Counters, Metric

METRICS = (
    Metric(
        "kvplug:query_tokens",
        "sparse_tokens",
        "Tokens whose attention went through retrieval (sparse) or the stock path (dense).",
        {"path": "sparse"},
    ),
    Metric("kvplug:query_tokens", "dense_tokens", "", {"path": "dense"}),
    Metric("kvplug:sparse_windows", "sparse_windows", "Windows that selected pages."),
    Metric(
        "kvplug:pages_attended",
        "pages_attended",
        "Pages that sparse windows attended to, sinks and local ones included, by KV head and "
        "layer.",
    ),
    Metric(
        "kvplug:pages_available",
        "pages_available",
        "Pages of the contexts of sparse windows, by KV head and layer.",
    ),
    Metric(
        "kvplug:unranked_rows",
        "unranked_rows",
        "Windows, by KV head and layer, whose scores were not finite.",
    ),
)


def selection_metrics() -> Counters:
    """The counters of one pipeline."""
    return Counters(METRICS)
