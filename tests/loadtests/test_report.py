"""What a report holds: every server, its loads and kinds; what is due; valid JSON."""

from __future__ import annotations

import json

import pytest

from kvplug.loadtests.report import build, planned
from kvplug.loadtests.run import materials_of, prepare
from kvplug.loadtests.slo import Slo
from tests.loadtests.made_up import record, run_of, settings


def test_json_has_no_infinities_and_names_the_ends_of_intervals() -> None:
    report = build(run_of("a", "b", slo=Slo()), [record(), record(setup="b")], [], [])
    told = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert told["schema"] == "kvplug-load/1"
    assert told["run"]["slo"] == {"ttft": None, "gap": None, "e2e": None, "share": 0.95}
    assert told["summaries"][0]["ttft"]["p50"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert told["partial"] is False
    assert told["pairs"][0]["setup"] == "b"


def test_kinds_and_loads_are_told_apart() -> None:
    stepped = settings(shape="step", levels=(1.0, 4.0), seconds=10.0)
    records = [
        record(intended=1.0, kind="short"), record(intended=6.0, kind="long"),
        record(intended=99.0, kind="long"),
    ]  # fmt: skip
    report = build(run_of("a", settings=stepped), records, [], [])
    assert {s.scope: s.requests for s in report.summaries} == {
        "all": 3, "load 1 users": 1, "load 4 users": 2, "short": 1, "long": 2,
    }  # fmt: skip
    one = build(run_of("a"), [record()], [], [])
    assert [s.scope for s in one.summaries] == ["all"]


@pytest.mark.parametrize(("shape", "levels"), [("constant", (7.0,)), ("sweep", (3.0, 9.0))])
def test_what_is_due_is_what_is_written(tokenizer, tmp_path, shape, levels) -> None:
    opened = settings(loop="open", shape=shape, levels=levels, seconds=2.0, requests=10)
    found = prepare(opened, materials_of(opened, tokenizer), tmp_path, lambda _: None)
    written = [part.path.read_text().splitlines() for part in found]
    assert [len(lines) for lines in written] == [len(part.arrivals) for part in found]
    assert sum(map(len, written)) == planned(opened) > 0
    # No phase asks again what another asked: a prefix cache would know it.
    numbers = [json.loads(line)[0] for lines in written for line in lines]
    assert numbers == list(range(len(numbers)))
    again = prepare(opened, materials_of(opened, tokenizer), tmp_path, lambda _: None)
    assert [part.arrivals for part in again] == [part.arrivals for part in found]
    assert [part.path.read_text().splitlines() for part in again] == written


def test_a_server_that_was_asked_nothing_is_left_out() -> None:
    report = build(run_of("a", "b", troubles={"b": "it died"}), [record()], [], [])
    assert [s.setup for s in report.summaries] == ["a"]
    assert report.pairs == []
