"""Files of LongBench and InfiniteBench: read, cut, asked and scored by the benchmarks' metrics."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from kvplug.errors import KvplugError
from kvplug.evals import text_metrics
from kvplug.evals.files import add_file
from kvplug.evals.fit import fit
from kvplug.evals.haystack import Noise
from kvplug.evals.metrics import METRICS
from kvplug.evals.tasks import TASKS
from kvplug.evals.tasks.base import Materials
from kvplug.evals.wording import Wording

MATERIALS = Materials(Noise(), Noise(), Wording())


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(TASKS, "_entries", dict(TASKS._entries))
    return tmp_path_factory.mktemp("files")


def written(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


LONGBENCH = {
    "input": "Who found it?", "context": " ".join(f"w{i}" for i in range(1000)),
    "answers": ["Ann Lee", "Lee"], "dataset": "hotpotqa", "all_classes": None,
}  # fmt: skip


def test_longbench_records_become_examples(folder: Path) -> None:
    name = add_file(written(folder / "any.jsonl", LONGBENCH))
    assert name == "file:hotpotqa"
    example = TASKS.get(name).make(random.Random(0), 5000, MATERIALS)
    assert example.document == LONGBENCH["context"]
    assert "Who found it?" in example.question
    score = METRICS[TASKS.get(name).metric]
    assert score("Lee", example) == 1.0
    assert score("It was the Ann Lee.", example) == pytest.approx(2 * 2 / (4 + 2))
    assert score("Bo", example) == 0.0


def test_a_long_context_loses_its_middle(folder: Path) -> None:
    name = add_file(written(folder / "any.jsonl", LONGBENCH))
    made = fit(TASKS.get(name), 300, 0, MATERIALS, lambda text: len(text.split()))
    kept = made.example.document.split()
    assert 180 < len(kept) < 240
    half = len(kept) // 2
    assert kept[:half] == [f"w{i}" for i in range(half)]
    assert kept[-half:] == [f"w{i}" for i in range(1000 - half, 1000)]


def test_infinitebench_records_are_named_by_their_file(folder: Path) -> None:
    record = {"id": 0, "context": "The pass key is 71432.", "input": "What is it?",
              "answer": ["71432"], "options": []}  # fmt: skip
    name = add_file(written(folder / "passkey.jsonl", record))
    example = TASKS.get(name).make(random.Random(0), 99, MATERIALS)
    assert METRICS[TASKS.get(name).metric]("it is 71432, I think", example) == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "no records"), ("{", "JSON lines"), ('{"dataset": "dureader"}', "'dureader'"),
     ('{"dataset": "trec", "context": "x"}', "without 'answer'")],
)  # fmt: skip
def test_other_files_are_refused(folder: Path, content: str, message: str) -> None:
    (folder / "x.jsonl").write_text(content)
    with pytest.raises(KvplugError, match=message):
        add_file(folder / "x.jsonl")
    with pytest.raises(KvplugError, match="JSON lines"):
        add_file(folder / "absent.jsonl")


@pytest.mark.parametrize(
    ("metric", "output", "answer", "score"),
    [
        ("f1", "a cat, the cat", "cat", 2 / 3),
        ("rouge_l", "the cat sat on it", "the cat on mats", 6 / 9),
        ("rouge_l", "", "the cat", 0.0),
        ("retrieval", "Paragraph 3, or 4", "Paragraph 3", 0.5),
        ("retrieval", "none", "3", 0.0),
        ("similarity", "return x\nmore", "return y", 7 / 8),
        ("similarity", "# a comment\nreturn y", "return y", 1.0),
        ("similarity", "", "abc", 0.0),
        ("holds", "so: SEVEN red", "seven  red", 1.0),
    ],
)
def test_metrics(metric: str, output: str, answer: str, score: float) -> None:
    assert getattr(text_metrics, metric)(output, answer) == pytest.approx(score)


@pytest.mark.parametrize(
    ("output", "score"),
    [("Location", 1.0), ("Location or Person", 0.5), ("Person", 0.0), ("City in Location", 1.0)],
)
def test_classification_shares_among_those_named(output: str, score: float) -> None:
    """A class whose name is a part of the answer's is no other class."""
    classes = ("Location", "Person", "Loc")
    assert text_metrics.classification(output, "Location", classes) == score
