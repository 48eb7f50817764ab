"""Counts, rates and percentiles of requests made by hand."""

from __future__ import annotations

import pytest

from kvplug.loadtests.slo import Slo
from kvplug.loadtests.summary import percentiles, span, summarise
from tests.loadtests.made_up import failed, record


def test_rates_count_what_succeeded() -> None:
    records = [
        record(session=0, end=4.0, cached_tokens=60),
        record(session=1, intended=1.0, sent=1.0, end=5.0, first=4.0, right=False),
        failed(session=2, intended=2.0, end=10.0),
        failed(session=3, error="cut off", first=3.0, end=4.0, completion_tokens=99),
    ]
    found = summarise("a", "all", records, Slo(ttft=2.0))
    assert found.requests == 4
    assert found.errors == {"http 503": 1, "cut off": 1}
    assert (found.checked, found.right) == (2, 1)
    assert found.seconds == 10.0
    assert found.requests_per_s == pytest.approx(0.2)
    assert found.output_tok_s == pytest.approx(0.6)
    assert found.input_tok_s == pytest.approx(20)
    # Only the first has its first token within 2 s; the fourth had one, and failed.
    assert found.goodput_per_s == pytest.approx(0.1)
    assert found.good.value == 0.25
    assert found.cached == 0.6
    assert found.token_by_token == 1.0
    assert {name: i.value for name, i in found.ttft.items()} == {"p50": 1.0}


def test_latency_counts_from_the_intended_time() -> None:
    late = [record(session=i, intended=0.0, sent=0.1 * i, first=0.1 * i + 1) for i in range(5)]
    found = summarise("a", "all", late, Slo())
    assert found.ttft["p50"].value == pytest.approx(1.2)
    assert found.ttft_sent["p50"].value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("count", "names"),
    [(1, ["p50"]), (9, ["p50"]), (10, ["p50", "p90"]), (19, ["p50", "p90"]),
     (20, ["p50", "p90", "p95"]), (99, ["p50", "p90", "p95"]),
     (100, ["p50", "p90", "p95", "p99"])],
)  # fmt: skip
def test_percentiles_need_requests(count: int, names: list[str]) -> None:
    assert list(percentiles([[1.0]] * count)) == names


def test_a_thousand_gaps_of_one_request_are_one_request() -> None:
    assert list(percentiles([[0.1] * 1000])) == ["p50"]


def test_phases_are_added_without_what_is_between_them() -> None:
    records = [
        record(phase=0, end=2.0), record(phase=0, intended=1.0, end=3.0),
        record(phase=1, intended=0.5, end=1.0),
    ]  # fmt: skip
    assert span(records) == 3.5


def test_zero_gaps_are_told() -> None:
    found = summarise("a", "all", [record(gaps=[0.0, 0.0, 0.0, 1.0])], Slo())
    assert found.zero_gaps == 0.75
    assert found.token_by_token == 0.0
