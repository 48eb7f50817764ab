"""The quality lab in real engines: retrieval keeps answers that random pages lose.

A run that has all its answers starts nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

TASKS = ("niah_single_1", "mqar", "joint_recall")
ARGUMENTS = [
    "eval", "recall", "--tasks", ",".join(TASKS), "--contexts", "8192", "--examples", "3",
    "--policies", "simhash,random-pages", "--budgets", "512", "--eager", "--json",
]  # fmt: skip


def run(*extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvplug", *ARGUMENTS, *extra],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def rows(files: Path) -> dict[tuple[str, str], Any]:
    done = run("--answers", str(files / "answers.jsonl"), "--html", str(files / "page.html"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {(row["setup"], row["task"]): row for row in found}


@pytest.mark.parametrize("task", TASKS)
def test_retrieval_keeps_what_random_pages_lose(
    rows: dict[tuple[str, str], Any], task: str
) -> None:
    dense = rows["dense", task]["accuracy"][0]
    assert dense > 0.5, "nothing to lose"
    assert rows["simhash@512", task]["accuracy"][0] >= dense
    assert rows["random-pages@512", task]["accuracy"][0] < dense / 2
    assert rows["random-pages@512", task]["same_output"] < 1


def test_speed_is_measured_beside_it(rows: dict[tuple[str, str], Any]) -> None:
    assert rows["dense", "all tasks"]["ttft_ratio"] == 1
    assert rows["simhash@512", "all tasks"]["ttft_ratio"] > 0
    assert rows["simhash@512", "all tasks"]["attended"] < 0.2


def test_a_finished_run_is_not_repeated(rows: dict[tuple[str, str], Any], files: Path) -> None:
    before = (files / "answers.jsonl").read_bytes()
    failed = run("--answers", str(files / "answers.jsonl"), "--fail-under", "0.9")
    assert failed.returncode == 1, "random pages keep less than that"
    assert (files / "answers.jsonl").read_bytes() == before
    assert "starting" not in failed.stderr
    assert json.loads(failed.stdout.splitlines()[-1]) == list(rows.values())
