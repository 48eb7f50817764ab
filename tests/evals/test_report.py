"""The page holds every row and figure by itself; the command says what was asked of it."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from kvplug.cli import app
from kvplug.errors import KvplugError
from kvplug.evals.command import MEASURED, chosen_tasks, lowest, own_setups, write_document
from kvplug.evals.lab import Result
from kvplug.evals.plan import Settings
from kvplug.evals.records import Records
from kvplug.evals.report import COLUMNS, cells, document, markdown, page
from kvplug.evals.run import run
from kvplug.evals.summary import ALL, summarise
from kvplug.evals.tasks import TASKS
from tests.evals.test_run import JOB, SETTINGS, SETUPS, Solver, quiet

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def result() -> Result:
    found = Records(None, SETTINGS)
    run(JOB, Solver(), found, quiet)
    answers = list(found.answers.values())
    return Result(SETTINGS, summarise(answers, SETUPS, 32), answers, 150.0)


def test_the_page_is_self_contained(result: Result) -> None:
    text = page([result, result])
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?http', text)
    assert text.count("plotly.js v") == 1
    for row in result.rows:
        for cell in cells(row):
            assert cell in text
    for title in ("Accuracy against budget", "What a speed-up costs", "dense: accuracy by place",
                  "simhash@512: accuracy by place"):  # fmt: skip
        assert title in text


def test_names_are_escaped() -> None:
    settings = Settings("<script>x", "prose", True, 32, 4096, False, False, "a processor", 2, {})
    text = page([Result(settings, [], [], 0.0)])
    assert "<script>x" not in text
    assert "&lt;script&gt;x" in text


def test_markdown_has_a_row_for_each(result: Result) -> None:
    lines = markdown(SETTINGS, result.rows).splitlines()
    assert len(lines) == len(result.rows) + 2
    assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}


def test_the_document_says_how_it_was_made(result: Result) -> None:
    text = document([result, result], {"recall": ["a.svg"]}, "kvplug eval recall")
    for part in ("`kvplug eval recall` in 5 minutes", "a processor, 2 threads", "vllm 0.32.0",
                 "| passkey |", "(a.svg)"):  # fmt: skip
        assert part in text
    assert text.count(f"| {ALL} |") == 12


def test_plots_name_every_setup(result: Result, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("docs") / "quality.md"
    write_document(path, [result])
    text = path.read_text()
    for name in ("quality/recall-budget.svg", "quality/recall-pareto.svg"):
        assert f"({name})" in text
        picture = (path.parent / name).read_text()
        assert ElementTree.fromstring(picture).tag.endswith("svg")
        assert "simhash" in picture
    before = (path.parent / name).read_bytes()
    write_document(path, [result])
    assert (path.parent / name).read_bytes() == before
    assert path.read_text() == text


def test_words_above_the_line_are_kept(result: Result, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("docs") / "quality.md"
    path.write_text(f"# Words\n\n{MEASURED}\n\nold figures\n")
    for _ in range(2):
        write_document(path, [result])
        text = path.read_text()
        assert text.startswith(f"# Words\n\n{MEASURED}\n\n# What retrieval costs")
        assert "old figures" not in text
        assert text.count("# What retrieval costs") == 1


def test_the_lowest_share_decides(result: Result) -> None:
    rows = result.rows
    assert lowest(rows) == min(row.kept.value for row in rows if row.kept)
    assert lowest([row for row in rows if row.task != "niah_multiquery" and row.task != ALL]) == 1
    assert lowest([]) is None


def test_sets_of_tasks() -> None:
    assert chosen_tasks("all") == list(TASKS)
    assert "passkey" in chosen_tasks("recall")
    assert "sort" not in chosen_tasks("recall")
    assert chosen_tasks("vt,passkey,vt") == ["vt", "passkey"]
    with pytest.raises(KvplugError, match="Unknown task 'passkeys'"):
        chosen_tasks("vt,passkeys")


def test_own_setups() -> None:
    assert own_setups(['mine={"policy": "hax"}']) == {"mine": '{"policy": "hax"}'}
    with pytest.raises(KvplugError, match="LABEL=OPTIONS"):
        own_setups(["mine"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recall", "--tasks", "niah"], "Unknown task 'niah'"),
        (["recall", "--policies", "simhas"], "Unknown policy 'simhas'"),
        (["recall", "--peers", "snapvk"], "There is no peer 'snapvk'"),
        (["recall", "--haystack", "no-such-folder"], "neither 'noise' nor"),
        (["recall", "--budgets", "0"], "positive whole numbers"),
        (["recall", "--setup", "mine", "--policies", "mine"], "LABEL=OPTIONS"),
        (["recall", "--tasks", "joint_recall", "--contexts", "300"], "needs"),
        (["http://127.0.0.1:9/v1", "--timeout", "2"], "cannot be reached"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert isinstance(result.exception, KvplugError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_fail_under_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvplug.evals.lab.LocalModel", lambda settings: Solver())
    arguments = ["eval", "recall", "--tasks", "niah_multiquery", "--contexts", "600",
                 "--examples", "2", "--budgets", "256", "--json"]  # fmt: skip
    passed = CliRunner().invoke(app, arguments)
    assert passed.exit_code == 0
    rows = json.loads(passed.stdout.splitlines()[-1])
    assert {row["setup"] for row in rows} == {"dense", "channels@256"}
    failed = CliRunner().invoke(app, [*arguments, "--fail-under", "0.99"])
    assert failed.exit_code == 1
    assert CliRunner().invoke(app, [*arguments, "--fail-under", "0.1"]).exit_code == 0
