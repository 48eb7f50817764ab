"""Runs that stop, go on, and are compared with dense: with a model that answers from the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvplug.errors import KvplugError
from kvplug.evals.plan import STOCK, Answer, Job, Question, Settings, Setup
from kvplug.evals.prompts import Prompts, Reply
from kvplug.evals.records import Records, read
from kvplug.evals.run import run, setups_of
from kvplug.evals.summary import ALL, first_difference, summarise
from tests.evals.solvers import SOLVERS

SETTINGS = Settings(
    "recall", "prose", True, 32, 4096, False, False, "a processor", 2, {"vllm": "0.32.0"}
)
SETUPS = setups_of(["simhash"], [256, 512], {})
JOB = Job(SETTINGS, SETUPS, ["passkey", "niah_multiquery"], [600, 900], 3)


class Solver:
    """Dense answers everything; a budget of 256 gets half of several answers, and is twice as fast.

    Args:
        fail_after: Replies before it breaks.
    """

    def __init__(self, fail_after: int = 10**9) -> None:
        self.prompts = Prompts(SETTINGS, lambda text: len(text.split()))
        self.fail_after = fail_after
        self.asked: list[tuple[str, Question]] = []

    def check(self, setups: list[Setup]) -> None:
        """Anything goes."""

    def replies(
        self, setups: list[Setup], asked: list[tuple[Setup, Question]]
    ) -> Iterator[tuple[Setup, Question, Reply]]:
        """Reads the answers in the prompts."""
        for setup, question in asked:
            if len(self.asked) == self.fail_after:
                raise KvplugError("The engine failed: it was told to.")
            self.asked.append((setup.label, question))
            output = SOLVERS[question.task](self.prompts.of(question).example)
            if setup.budget == 256 and question.task == "niah_multiquery":
                output = output[: len(output) // 2]
            speed = 1.0 if setup.policy == STOCK else 2.0
            yield setup, question, Reply(output, [ord(c) for c in output], 3 / speed, 10 * speed)


def quiet(text: str) -> None:
    """Says nothing."""


def test_every_setup_gets_every_question() -> None:
    model, records = Solver(), Records(None, SETTINGS)
    run(JOB, model, records, quiet)
    labels = ["dense", "simhash@256", "simhash@512"]
    assert [label for label, _ in model.asked] == sorted(labels * 12)
    for label in labels:
        assert [q for name, q in model.asked if name == label] == JOB.questions()


def test_a_run_that_failed_goes_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "new" / "answers.jsonl"
    first = Solver(fail_after=17)
    with pytest.raises(KvplugError, match="told to"):
        run(JOB, first, Records(path, SETTINGS), quiet)
    # As a killed process leaves it.
    path.write_text(path.read_text() + '{"setup": "dense", "ta')
    second = Solver()
    records = Records(path, SETTINGS)
    run(JOB, second, records, quiet)
    assert len(first.asked) == 17
    assert sorted([*first.asked, *second.asked]) == sorted(set(first.asked) | set(second.asked))
    assert len(records.answers) == 36
    settings, answers = read(path)
    assert settings == SETTINGS
    assert {(a.setup, a.question): a for a in answers} == records.answers


def test_other_settings_are_refused_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("run") / "answers.jsonl"
    run(replace(JOB, examples=1), Solver(), Records(path, SETTINGS), quiet)
    before = path.read_bytes()
    with pytest.raises(KvplugError, match="haystack 'prose' -> 'noise'; page 32 -> 64"):
        Records(path, replace(SETTINGS, haystack="noise", page=64))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["no json\n", "{}\n", '{"settings": {"model": 1}}\n', "[]\n"])
def test_another_file_is_refused(content: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(KvplugError, match="not a file of answers"):
        Records(path, SETTINGS)
    assert path.read_text() == content


def test_setups() -> None:
    own = {"mine": json.dumps({"policy": "hax", "options": {"rounds": 8}})}
    found = setups_of(["dense", "quest", "mine"], [256, 512], own)
    assert [setup.label for setup in found] == [
        "dense", "quest@256", "quest@512", "mine@256", "mine@512",
    ]  # fmt: skip
    assert found[-1] == Setup("mine@512", "hax", 512, {"options": {"rounds": 8}})


def test_what_is_left_of_dense_accuracy() -> None:
    records = Records(None, SETTINGS)
    run(JOB, Solver(), records, quiet)
    rows = summarise(list(records.answers.values()), SETUPS, 32)
    found = {(row.setup, row.task, row.context): row for row in rows}
    assert len(rows) == len(found) == 3 * 2 * 3
    for row in rows:
        assert row.kept is not None
        dense, half = row.setup == STOCK, row.setup == "simhash@256"
        assert row.ttft_ratio == row.decode_ratio == (1.0 if dense else 2.0)
        assert row.examples == (6 if row.task == ALL else 3)
        if not half or row.task == "passkey":
            assert row.accuracy == row.kept == (1.0, 1.0, 1.0)
            assert row.same_output == 1.0
            assert row.first_difference is None
        elif row.task == "niah_multiquery":
            assert 0.0 < row.kept.value < 1.0
            assert row.same_output == 0.0
            assert row.first_difference is not None
        else:
            assert row.kept.low < row.kept.value < 1.0
            assert row.same_output == 0.5


def answer(**changed: object) -> Answer:
    base = Answer("dense", "passkey", 600, 0, 580, 0.5, "1", [1], 1.0, 1.0, 1.0)
    return replace(base, **changed)  # type: ignore[arg-type]


def test_only_questions_that_dense_answered_are_compared() -> None:
    answers = [answer(), answer(number=1, score=0.0)]
    answers += [answer(setup="simhash@256", number=n, score=float(n == 0)) for n in range(9)]
    row = next(row for row in summarise(answers, SETUPS, 32) if row.setup == "simhash@256")
    assert row.examples == 9
    assert row.accuracy.value == pytest.approx(1 / 9)
    assert row.kept is not None
    assert row.kept.value == 1.0


@pytest.mark.parametrize(
    ("tokens", "base", "place"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 3], 1), ([], [4], 0), ([], [], None)],
)
def test_first_difference(tokens: list[int], base: list[int], place: int | None) -> None:
    assert first_difference(tokens, base) == place


def test_paths_are_not_needed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(KvplugError, match="not a file of answers"):
        read(Path(tmp_path_factory.mktemp("run")))
