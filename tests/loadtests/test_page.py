"""The page needs nothing but itself, says first whether to believe it, and escapes names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from kvplug.loadtests.page import page
from kvplug.loadtests.records import Record
from kvplug.loadtests.report import build
from kvplug.loadtests.slo import Slo
from kvplug.loadtests.vllm_bench import Foreign
from tests.loadtests.made_up import EXACT, failed, record, run_of, settings

REQUESTS = [
    *(record(session=i, end=2.0 + i) for i in range(10)),
    *(record(setup="b", session=i, first=0.5, end=2.0 + i) for i in range(9)),
    failed(setup="b", session=9, detail="<b>no</b> room\x1b[0m"),
]
SAMPLES: list[dict[str, Any]] = [
    {"kind": "client", "setup": "a", "cpu": 0.1, "late": [0.0]},
    {"kind": "phase", "setup": "a", "phase": 0, "clock": 100.0},
    {"kind": "server", "setup": "a", "clock": 99.0, "vllm:kv_cache_usage_perc": 0.1,
     "kvplug:pages_total": 50.0},
    {"kind": "server", "setup": "a", "clock": 101.0, "vllm:kv_cache_usage_perc": 0.5,
     "kvplug:pages_total": 57.0},
]  # fmt: skip


def drawn(records: list[Record] = REQUESTS, **changed: Any) -> str:
    foreign = Foreign("other", {"request_rate": 2}, 5, 0, 9.0, 0.5, 7.0, {"p50": 0.25}, {}, {})
    report = build(run_of("a", "b", **changed), records, SAMPLES, [foreign])
    return page(report, records, SAMPLES)


def test_nothing_comes_from_outside() -> None:
    text = drawn()
    assert not re.findall(r"https?:|//[\w.-]+\.\w|<script|<link|<img|@import|url\(", text)
    assert text.count("<svg") >= 4


def test_trust_comes_first_and_servers_are_compared() -> None:
    text = drawn()
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[0] == "Can the client be believed?"
    for title in ("Throughput and goodput", "The same prompts, one by one", "Failures",
                  "Between pieces of text", "First token, from the intended time", "Environment",
                  "Beside it: vllm bench serve", "What the servers say of themselves"):  # fmt: skip
        assert title in titles
    assert "<p class=banner>" not in text
    assert "2x (2 to 2)" in text  # first tokens after 1 s and 0.5 s
    assert "0.2500 s" in text
    assert "vllm:kv_cache_usage_perc" in text


def test_counters_count_from_the_run() -> None:
    assert "kvplug:pages_total" in drawn()
    report = build(run_of("a"), REQUESTS[:10], SAMPLES, [])
    still = [
        {**s, **({"kvplug:pages_total": 50.0} if s["kind"] == "server" else {})} for s in SAMPLES
    ]
    assert "kvplug:pages_total" not in page(report, REQUESTS[:10], still)


def test_names_and_what_servers_say_are_escaped() -> None:
    text = drawn()
    assert "&lt;b&gt;no&lt;/b&gt; room" in text
    assert "a &lt;chip&gt;" in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"troubles": {"b": "the server died: out of <memory>"}},
            "b: the server died: out of &lt;",
        ),
        ({"is_over": False}, "Partial: not everything was asked. The run did not end by itself."),
        ({"calibration": replace(EXACT, ttft_p95=0.02)}, "The client is not believable here."),
        ({"calibration": None}, "The client is not believable here.  calibration: none"),
    ],
)
def test_banners(changed: dict[str, Any], words: str) -> None:
    text = drawn(**changed)
    assert words in text
    assert text.index("<p class=banner>") < text.index("<h2>")


def test_a_run_without_requests_has_a_page() -> None:
    assert "Can the client be believed?" in drawn([])


def test_a_sweep_has_its_knee_marked() -> None:
    swept = settings(loop="open", shape="sweep", levels=(1.0, 2.0), seconds=5.0, requests=3)
    records = [record(phase=0, session=i) for i in range(3)]
    records += [record(phase=1, session=i, first=9.0, end=10.0) for i in range(3)]
    run = run_of("a", settings=swept, slo=Slo(ttft=2.0))
    report = build(run, records, [], [])
    assert report.knees["a"].load == 1.0
    assert report.knees["a"].fails_at == 2.0
    assert [s.scope for s in report.summaries] == ["all", "load 1 per s", "load 2 per s"]
    text = page(report, records, [])
    assert text.count("<circle class=ring") == 1
    assert "<h2>Knee</h2>" in text
