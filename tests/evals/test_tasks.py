"""Every task is what its definition says, and its answer follows from its prompt alone."""

from __future__ import annotations

import math
import random
import re
import statistics

import pytest

from kvplug.errors import KvplugError
from kvplug.evals.fit import fit
from kvplug.evals.haystack import NOISE, Noise, Prose, Texts, haystack
from kvplug.evals.metrics import METRICS
from kvplug.evals.tasks import TASKS
from kvplug.evals.tasks.associative import PAIRS, gaps
from kvplug.evals.tasks.base import Example, Materials, Task
from kvplug.evals.tasks.episodes import events
from kvplug.evals.tasks.passkeys import NumberString
from kvplug.evals.wording import Wording
from tests.evals.solvers import SOLVERS

SEEDS = range(12)


def materials(plain: bool) -> Materials:
    return Materials(Noise(), Prose(), Wording(plain))


def examples(name: str, plain: bool, size: int = 300) -> list[Example]:
    task = TASKS.get(name)
    return [task.make(random.Random(seed), size, materials(plain)) for seed in SEEDS]


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("plain", [False, True], ids=["as defined", "plain"])
@pytest.mark.parametrize("name", list(TASKS))
def test_a_solver_that_reads_the_prompt_scores_everything(name: str, plain: bool) -> None:
    metric = METRICS[TASKS.get(name).metric]
    for example in examples(name, plain):
        assert metric(SOLVERS[name](example), example) == 1.0
        assert metric("", example) == 0.0


@pytest.mark.parametrize("name", list(TASKS))
def test_the_same_seed_gives_the_same_example(name: str) -> None:
    assert examples(name, False) == examples(name, False)
    assert len({example.prompt for example in examples(name, False)}) == len(SEEDS)


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"sort", "vt", "cwe", "fwe"}))
def test_the_answer_is_not_in_the_question(name: str) -> None:
    for example in examples(name, False):
        for answer in example.answers:
            assert answer.lower() not in f"{example.question} {example.opening}".lower()
            assert answer in example.document


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("context", [1500, 4000])
def test_a_prompt_fills_its_context(name: str, context: int) -> None:
    task: Task = TASKS.get(name)
    made = fit(task, context, 3, materials(True), words)
    assert made.tokens == words(made.example.prompt)
    assert context * 0.85 - task.max_tokens <= made.tokens <= context - task.max_tokens


def test_a_context_that_is_too_short_is_refused() -> None:
    with pytest.raises(KvplugError, match="'joint_recall' needs"):
        fit(TASKS.get("joint_recall"), 40, 0, materials(True), words)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3", "kv_retrieval"])
def test_keys_are_unique_and_depths_even(name: str) -> None:
    depths = []
    for example in examples(name, False):
        pattern = r'"([^"]+)": "' if name == "kv_retrieval" else r"for ([^:]+?) is: "
        keys = re.findall(pattern, example.document)
        assert len(keys) == len(set(keys)) == 300
        assert example.depth is not None
        depths.append(example.depth)
    assert 0.25 < statistics.fmean(depths) < 0.75


@pytest.mark.parametrize("name", ["niah_single_1", "passkey"])
def test_the_needle_stands_at_its_depth_in_noise(name: str) -> None:
    for example in examples(name, False):
        assert example.depth is not None
        place = example.document.index(example.answers[0]) / len(example.document)
        assert place == pytest.approx(example.depth, abs=0.03)
        assert example.document.count(NOISE[0]) == 60


def test_four_values_of_one_key_and_four_keys() -> None:
    for example in examples("niah_multivalue", False):
        assert len(set(example.answers)) == 4
    for example in examples("niah_multiquery", False):
        assert len(set(example.answers)) == 4
        assert all(example.document.count(answer) == 1 for answer in example.answers)


def test_a_chain_has_four_hops() -> None:
    for example in examples("vt", False):
        assert len(re.findall(r"VAR \w{5} = VAR \w{5}\.", example.document)) == 4
        assert len(re.findall(r"VAR \w{5} = \d{5}\.", example.document)) == 1


def test_common_words_stand_30_times_and_others_3_times() -> None:
    for example in examples("cwe", False):
        listed = re.findall(r"\d+\. (\S+)", example.document)
        counts = {word: listed.count(word) for word in set(listed)}
        assert {word for word, count in counts.items() if count == 30} == set(example.answers)
        assert all(count == 3 for word, count in counts.items() if word not in example.answers)


def test_frequent_words_follow_a_zeta_law() -> None:
    for example in examples("fwe", False, 3000):
        counts = [example.document.split().count(answer) for answer in example.answers]
        assert counts[0] / counts[1] == pytest.approx(4, rel=0.05)
        assert counts[0] / counts[2] == pytest.approx(9, rel=0.05)


def test_mqar_gaps_follow_the_power_law() -> None:
    """Nearly log-uniform: the median of one draw is about the root of the number of slots."""
    slots = 10_000
    found = [gaps(seed, slots, 1)[0] + 1 for seed in range(400)]
    middle = math.exp(statistics.fmean(map(math.log, found)))
    assert slots**0.4 < middle < slots**0.6
    many = gaps(1, slots, PAIRS)
    assert len(set(many)) == PAIRS
    assert many == sorted(many)
    assert many[-1] < slots


def test_mqar_pairs_come_first_and_the_asked_key_once() -> None:
    for example in examples("mqar", False):
        key = example.question.removeprefix("What is the code of ").rstrip("?")
        said = re.findall(r"The code of (\S+) is", example.document)
        assert len(set(said[:PAIRS])) == PAIRS
        assert said.count(key) == 1
        assert all(said.count(other) == 2 for other in said[:PAIRS] if other != key)


def test_joint_recall_needs_the_context() -> None:
    """Every key has a value in each of 5 to 16 contexts, mostly different ones."""
    for example in examples("joint_recall", False):
        said = re.findall(r"In context (\S+), (\S+) is (\S+?)\.", example.document)
        contexts, keys = {c for c, _, _ in said}, {k for _, k, _ in said}
        assert len(said) == len(contexts) * len(keys) == len({(c, k) for c, k, _ in said})
        assert 5 <= len(contexts) <= 16
        assert 5 <= len(keys) <= 16
        key = example.question.split()[2]
        assert len({value for _, k, value in said if k == key}) > 1


def test_number_strings_repeat_digits() -> None:
    numbers = [NumberString().number(random.Random(seed)) for seed in range(50)]
    assert all(len(number) == 10 for number in numbers)
    assert all(len(re.findall(r"(\d)\1*", number)) == 4 for number in numbers)


def test_orders_are_balanced_and_segments_long_enough() -> None:
    task, made = TASKS.get("sort"), []
    for seed in range(60):
        made.append(task.make(random.Random(seed), 60, materials(False)))
    assert 15 < sum(example.answers == ("A",) for example in made) < 45
    segments = re.findall(r"^[AB]: (.*)$", "\n".join(e.question for e in made), re.MULTILINE)
    assert statistics.median(len(segment.split()) for segment in segments) >= 20


def test_events_repeat_coordinates_but_not_pairs() -> None:
    found = events(random.Random(5), 200)
    assert len({(event.date, event.person) for event in found}) == 200
    assert len({(event.date, event.place) for event in found}) == 200
    counts = sorted(sum(e.place == p for e in found) for p in {e.place for e in found})
    assert counts[-1] >= 10  # geometric with p = 0.1: the most frequent place has a tenth
    assert counts[0] == 1


def test_text_files_of_a_directory_are_a_haystack(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "one.txt").write_text("First  sentence.\nSecond one! Third?")
    found = haystack(str(folder)).sentences(random.Random(0), 6)
    assert set(found) == {"First sentence.", "Second one!", "Third?"}
    assert found[:3] == found[3:]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"  \n", "is empty"), (b"a\0b", "not UTF-8"),
                             (b"\xff\xfe\x00", "not UTF-8")],
)  # fmt: skip
def test_files_without_text_are_refused(
    content: bytes, message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "good.txt").write_text("A sentence.")
    (folder / "bad.txt").write_bytes(content)
    with pytest.raises(KvplugError, match=f"bad.txt.*{message}"):
        Texts.of_directory(folder)


def test_a_haystack_that_does_not_exist_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with pytest.raises(KvplugError, match="neither 'noise' nor 'prose' nor a directory"):
        haystack("no-such-thing")
    with pytest.raises(KvplugError, match="No text files"):
        haystack(str(tmp_path_factory.mktemp("empty")))


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(KvplugError, match="niah_single_1"):
        TASKS.get("niah_single")
