"""Random requests, aborts, preemptions, prefix hits and a failing disk: answers as in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvplug.models.documents import needle_prompt
from tests.engine.forked import run_main

pytestmark = pytest.mark.engine
HOT = {"tier": "disk", "hot_gib": 0.005, "cold_gib": 0.25}
BLOCKS = 170
"""Of 32 tokens: two of the longest prompts do not fit."""


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Short and long ones; every second one begins like the one before it."""
    found = []
    for n, length in enumerate((300, 1300, 2200, 2600)):
        first = needle_prompt(tokenizer, length, depth=0.3, seed=n).token_ids
        other = needle_prompt(tokenizer, length, depth=0.6, seed=50 + n).token_ids
        found += [first, first[: length // 2] + other[length // 2 :]]
    return found


def served(model: str, prompts: list[list[int]], **spec: Any) -> dict[str, Any]:
    """A schedule's result."""
    asked = {"model": model, "prompts": prompts, "blocks": BLOCKS, **spec}
    done = run_main("offload_child", json.dumps(asked))
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def truth(recall_model: str, prompts: list[list[int]]) -> dict[str, list[int]]:
    """Each prompt's answer, in memory."""
    result = served(recall_model, prompts, offload=None, seed=1, steps=100, blocks=4000)
    assert sorted(result["answers"], key=int) == [str(n) for n in range(len(prompts))]
    for answers in result["answers"].values():
        assert all(answer == answers[0] for answer in answers)
    return {number: answers[0] for number, answers in result["answers"].items()}


def offload(tmp_path_factory: pytest.TempPathFactory, **options: Any) -> dict[str, Any]:
    return {**HOT, "path": str(tmp_path_factory.mktemp("cold")), **options}


@pytest.mark.parametrize("prefetch", [[], ["last", "events", "next_layer"]], ids=["", "prefetch"])
def test_a_random_schedule(recall_model, prompts, truth, tmp_path_factory, prefetch):
    result = served(
        recall_model, prompts, offload=offload(tmp_path_factory, prefetch=prefetch), seed=2,
        steps=300,
    )  # fmt: skip
    for number, answers in result["answers"].items():
        assert all(answer == truth[number] for answer in answers)
    assert result["aborted"] > 3
    assert result["preempted"] > 3
    assert result["hits"] > 3
    assert not result["failed"]
    assert result["free"] == BLOCKS - 1, "a block was leaked (one is vLLM's own)"
    assert all(pool["evictions"] > 100 for pool in result["pools"])
    if prefetch:
        assert result["pools"][0]["prefetched_events"] > 0
        assert result["pools"][1]["prefetch_hits_next_layer"] > 0


def test_a_recipe_that_looks_ahead_answers_alike_in_any_cache(recall_model, prompts):
    """Pages depend on queries behind them, in which requests differ that share them."""
    memory: dict[str, Any] = {"offload": None, "policy": "emllm"}
    roomy = served(recall_model, prompts, seed=1, steps=100, **{**memory, "blocks": 4000})
    tight = served(recall_model, prompts, seed=2, steps=300, **memory)
    for number, answers in tight["answers"].items():
        assert all(answer == roomy["answers"][number][0] for answer in answers)
    assert tight["preempted"] > 3
    assert tight["hits"] > 3


def test_a_failing_disk_fails_those_who_need_it(recall_model, prompts, truth, tmp_path_factory):
    result = served(
        recall_model, prompts, offload=offload(tmp_path_factory), seed=3, steps=160, fault=60
    )  # fmt: skip
    assert 1 <= len(result["failed"]) <= 6
    assert sum(pool["failed"] for pool in result["pools"]) > 0
    for number, answers in result["answers"].items():
        assert all(answer == truth[number] for answer in answers)
    short = sum(len(result["answers"].get(str(n), [])) for n in (0, 1))
    assert short > 0
    served_later = sum(map(len, result["answers"].values()))
    assert served_later > len(result["failed"])
    assert result["free"] == BLOCKS - 1
