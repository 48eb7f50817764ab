"""A report for programs: JSON, a row of CSV for every request, JUnit for a pipeline."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from kvplug.loadtests.folder import Folder
from kvplug.loadtests.page import page
from kvplug.loadtests.records import Record
from kvplug.loadtests.report import Report, build
from kvplug.loadtests.vllm_bench import Foreign

COLUMNS = (
    "setup", "phase", "session", "turn", "kind", "process", "intended", "free", "sent", "first",
    "end", "ttft", "ttft_sent", "gap", "total", "lag", "prompt_tokens", "completion_tokens",
    "cached_tokens", "finish", "right", "error", "good",
)  # fmt: skip


class Case(NamedTuple):
    """One test of JUnit's."""

    suite: str
    name: str
    problem: str | None


def write_all(folder: Folder, foreign: Sequence[Foreign]) -> Report:
    """Computes the report of a folder and writes it there in every form.

    Args:
        folder: Of a load test, whole or not.
        foreign: Results of other tools.

    Raises:
        KvplugError: The folder holds none.
    """
    run, records, samples = folder.read()
    report = build(run, records, samples, foreign)
    (folder.path / "report.json").write_text(json.dumps(report.to_json(), indent=1))
    write_csv(folder.path / "requests.csv", report, records)
    (folder.path / "junit.xml").write_bytes(junit(report))
    (folder.path / "report.html").write_text(page(report, records, samples))
    return report


def write_csv(path: Path, report: Report, records: Sequence[Record]) -> None:
    """A row for every request. Seconds count from the beginning of its phase."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for record in records:
            good = report.run.slo.is_good(record)
            rows.writerow([good if c == "good" else getattr(record, c) for c in COLUMNS])


def cases(report: Report) -> Iterator[Case]:
    """What a pipeline should fail on."""
    for check in report.checks:
        if check.limit:
            problem = None if check.is_fine else f"{check.found}, should be {check.limit}"
            yield Case(check.setup or "client", check.name, problem)
    for setup in report.run.setups:
        trouble = report.run.troubles.get(setup) or report.run.troubles.get("")
        if trouble is None and not report.run.is_over:
            trouble = "the run did not end by itself"
        yield Case(setup, "asked everything", trouble)
    for summary in report.whole():
        told = ", ".join(f"{count} x {kind}" for kind, count in summary.errors.items())
        yield Case(summary.setup, "no request fails", told or None)
        wrong = summary.checked - summary.right
        yield Case(
            summary.setup, "answers are right",
            f"{wrong} of {summary.checked} are wrong" if wrong else None,
        )  # fmt: skip
        kept = summary.good.value
        yield Case(
            summary.setup, f"limits are kept: {report.run.slo}",
            f"by {kept:.1%}, should be {report.run.slo.share:.0%}"
            if kept < report.run.slo.share else None,
        )  # fmt: skip


def junit(report: Report) -> bytes:
    """The report as JUnit's XML: one suite for the client and one for each server."""
    root = ElementTree.Element("testsuites", name="kvplug load")
    found = list(cases(report))
    for suite in dict.fromkeys(case.suite for case in found):
        mine = [case for case in found if case.suite == suite]
        failures = sum(case.problem is not None for case in mine)
        element = ElementTree.SubElement(
            root, "testsuite", name=suite, tests=str(len(mine)), failures=str(failures), errors="0"
        )
        for case in mine:
            test = ElementTree.SubElement(element, "testcase", classname=suite, name=case.name)
            if case.problem is not None:
                # XML has no way to say the control characters of a log's colours.
                plain = "".join(c for c in case.problem if c.isprintable())
                ElementTree.SubElement(test, "failure", message=plain)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
