"""JUnit fails on what a pipeline should fail on; CSV has a row for every request."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from kvplug.loadtests.outputs import COLUMNS, cases, junit, write_csv
from kvplug.loadtests.report import Report, build
from kvplug.loadtests.slo import Slo
from tests.loadtests.made_up import EXACT, failed, record, run_of

BEATS: list[dict[str, Any]] = [{"kind": "client", "setup": "a", "cpu": 0.1, "late": [0.0]}]


def report_of(*records: Any, **changed: Any) -> Report:
    return build(run_of("a", **changed), records or [record()], BEATS, [])


def problems(report: Report) -> list[tuple[str, str]]:
    return [(c.name, c.problem) for c in cases(report) if c.problem is not None]


def test_junit_counts_what_it_holds() -> None:
    report = report_of(
        failed(), record(session=1), troubles={"a": "the \x1b[31mserver\x1b[0m <died>"}
    )
    root = ElementTree.fromstring(junit(report))
    assert root.tag == "testsuites"
    suites = root.findall("testsuite")
    assert [suite.attrib["name"] for suite in suites] == ["client", "a"]
    for suite in suites:
        assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
        assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
    messages = [failure.attrib["message"] for failure in root.iter("failure")]
    assert any("<died>" in message and "\x1b" not in message for message in messages)
    assert "1 x http 503" in messages


def test_a_good_run_fails_nothing() -> None:
    assert problems(report_of()) == []
    assert {case.suite for case in cases(report_of())} == {"client", "a"}


@pytest.mark.parametrize(
    ("report", "name", "problem"),
    [
        (report_of(record(right=False)), "answers are right", "1 of 1 are wrong"),
        (report_of(failed(), slo=Slo(share=0.1)), "no request fails", "1 x http 503"),
        (report_of(slo=Slo(ttft=0.5)), "limits are kept: ttft at most 0.5 s", "by 0.0%"),
        (report_of(troubles={"": "interrupted"}), "asked everything", "interrupted"),
        (report_of(is_over=False), "asked everything", "did not end"),
        (
            report_of(calibration=replace(EXACT, ttft_p95=1.0)),
            "error of first tokens",
            "1000.00 ms",
        ),
    ],
)
def test_each_way_to_fail(report: Report, name: str, problem: str) -> None:
    found = problems(report)
    assert any(case.startswith(name) and problem in words for case, words in found), found


def test_names_do_not_change_from_run_to_run() -> None:
    slow = report_of(record(sent=0.003, first=1.7, end=9.0))
    assert [(c.suite, c.name) for c in cases(slow)] == [
        (c.suite, c.name) for c in cases(report_of())
    ]


def test_csv_has_every_request(tmp_path: Path) -> None:
    records = [record(), failed(session=1)]
    write_csv(tmp_path / "x.csv", report_of(), records)
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert (rows[0]["ttft"], rows[0]["total"], rows[0]["good"]) == ("1.0", "2.0", "True")
    assert (rows[1]["error"], rows[1]["first"], rows[1]["good"]) == ("http 503", "", "False")
