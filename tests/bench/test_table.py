"""The recipes table: what each engine is asked, what becomes of its cells, what a failure costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvplug.bench import document, table
from kvplug.bench.job import Job
from kvplug.bench.recipes import Recipe
from kvplug.bench.sweep import Sweep
from kvplug.bench.table import Plan, Row, measure, numbers_for
from kvplug.errors import KvplugError

JOB = Job("", "recall", [8192, 32768], [1], 3, 32, 4096, 64, False, 1, {})
QUEST = Recipe("quest-wide", {"policy": "quest", "local": 1024, "options": {}}, "Why.")
STREAMING = Recipe("streaming", {"policy": "streaming"})


def plan(*recipes: Recipe, **changed: Any) -> Plan:
    settings = {"budgets": [256, 512], "needles": [10, 100], "mass_questions": 5}
    return Plan(job=JOB, recipes=list(recipes), dense_repeats=2, **{**settings, **changed})


def cell(sweep: Sweep, context: int, budget: int) -> dict[str, Any]:
    """What an engine would print; stock vLLM is twice as slow as a policy with 256 tokens."""
    slow = 2 if sweep.job.policy == "dense" else budget / 256
    stock = sweep.job.policy == "dense"
    return {
        "context_tokens": context, "budget_tokens": budget, "ttft_s": slow * context / 8192,
        "decode_tok_s": 100 / slow, "needles": 10, "recalled": 9,
        "mass": None if stock else 0.75, "best_mass": None if stock else 0.9,
        "mass_by_layer": None if stock else [1.0, 0.5],
        "index_bytes_per_token": None if stock else 32.0,
    }  # fmt: skip


def quiet(text: str) -> None:
    """Progress that nobody reads."""


class Engines:
    """Stands in for engine processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sweeps: list[Sweep] = []
        self.fails: dict[str, int] = {}
        """Policy -> cells before its engine fails."""
        monkeypatch.setattr(table, "results", self.results)

    def results(self, module: str, job: Job, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        assert module == "kvplug.bench.sweep"
        sweep = Sweep.from_json(text)
        assert sweep.job == job
        self.sweeps.append(sweep)
        cells = [cell(sweep, c, b) for c in sweep.job.contexts for b in sweep.budgets]
        for number, data in enumerate(cells):
            if number == self.fails.get(job.policy):
                raise KvplugError("The engine failed: [rank0] boom.")
            yield "CELL", data


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    return Engines(monkeypatch)


def run(of: Plan) -> tuple[list[Row], dict[str, str], list[str]]:
    told: list[str] = []
    rows, failures = measure(of, told.append, lambda rows, failures: None)
    return rows, failures, told


def test_one_engine_for_each_row(engines: Engines) -> None:
    run(plan(QUEST, STREAMING))
    stock, quest, streaming = engines.sweeps
    assert (stock.job.policy, stock.job.options, stock.job.repeats) == ("dense", {}, 2)
    assert stock.mass_questions == 0
    assert quest.job.policy == "quest"
    assert quest.job.options == {"local": 1024, "options": {}, "budget": 256}
    assert (quest.job.repeats, quest.budgets, quest.needles) == (3, [256, 512], [10, 100])
    assert quest.mass_questions == 5
    assert streaming.budgets == [256]  # the others would be the same


def test_rows_and_ratios(engines: Engines) -> None:
    rows, failures, told = run(plan(QUEST, STREAMING))
    assert not failures
    found = [(row["recipe"], row["context_tokens"], row["budget_tokens"]) for row in rows]
    assert found == [
        ("dense", 8192, None), ("dense", 32768, None),
        ("quest-wide", 8192, 256), ("quest-wide", 8192, 512),
        ("quest-wide", 32768, 256), ("quest-wide", 32768, 512),
        ("streaming", 8192, None), ("streaming", 32768, None),
    ]  # fmt: skip
    assert [row["ttft_ratio"] for row in rows] == [1, 1, 2, 1, 2, 1, 2, 2]
    assert [row["decode_ratio"] for row in rows] == [1, 1, 2, 1, 2, 1, 2, 2]
    assert "quest-wide: 8,192 tokens, budget 512, 9 of 10 needles, first token 2.00 s" in told


def test_a_failure_costs_one_recipe(engines: Engines) -> None:
    """What it measured before stays in, and the others go on."""
    engines.fails = {"quest": 3}
    rows, failures, told = run(plan(QUEST, STREAMING))
    assert [row["recipe"] for row in rows] == ["dense"] * 2 + ["quest-wide"] * 3 + ["streaming"] * 2
    assert failures == {"quest-wide": "The engine failed: [rank0] boom."}
    assert failures["quest-wide"] in told


def test_without_stock_vllm_there_is_no_table(engines: Engines) -> None:
    engines.fails = {"dense": 0}
    with pytest.raises(KvplugError, match="boom"):
        run(plan(QUEST))
    assert len(engines.sweeps) == 1


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"budgets": [256, 7]}, "at least one page"),
        ({"needles": [10]}, "2 contexts and 1 numbers"),
        ({"recipes": [Recipe("x", {"policy": "qest"})]}, "did you mean 'quest'"),
    ],
)
def test_a_plan_is_checked_before_any_engine(changed: dict[str, Any], sentence: str) -> None:
    recipes = changed.pop("recipes", [QUEST])
    with pytest.raises(KvplugError, match=sentence):
        plan(*recipes, **changed)


def test_one_number_for_all() -> None:
    assert numbers_for([1, 2, 3], [7]) == [7, 7, 7]
    assert numbers_for([1, 2], [7, 8]) == [7, 8]
    assert numbers_for([1, 2], [7, 8, 9]) == [7, 8, 9]  # which a plan refuses


def test_the_page_is_there_after_every_engine(
    engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped leaves what it measured, and JSON from which the page can be drawn."""
    path = tmp_path / "docs" / "recipes.md"
    seen: list[int] = []
    original = document.write

    def write(data: document.Document, where: Path) -> None:
        original(data, where)
        seen.append(len(json.loads(where.with_suffix(".json").read_text())["rows"]))

    monkeypatch.setattr(document, "write", write)
    result = document.measured(plan(QUEST, STREAMING), "kvplug bench recipes", path, quiet)
    assert seen == [2, 6, 8]
    read = document.read(path.with_suffix(".json"))
    assert read == json.loads(json.dumps(result))
    text = path.read_text()
    original(read, path)
    assert path.read_text() == text


def test_gaps_are_told_in_the_end(engines: Engines) -> None:
    engines.fails = {"quest": 3, "streaming": 0}
    result = document.measured(plan(QUEST, STREAMING), "kvplug bench recipes", None, quiet)
    with pytest.raises(KvplugError, match=r"quest-wide: .*boom\. \(1 more failed\)"):
        document.check_complete(result)


def test_unwritable_pages_and_unreadable_figures(engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("[1]")
    with pytest.raises(KvplugError, match="cannot be written"):
        document.measured(plan(QUEST), "", tmp_path / "file" / "x.md", quiet)
    assert not engines.sweeps
    with pytest.raises(KvplugError, match="must be the JSON"):
        document.read(tmp_path / "file")
    with pytest.raises(KvplugError, match="cannot be read"):
        document.read(tmp_path / "none")
