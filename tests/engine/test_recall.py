"""Retrieval finds what it should: needles come back through selected pages alone."""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.models.documents import needle_questions

pytestmark = pytest.mark.engine
CONTEXT = 8192
NEEDLES = 24


@pytest.fixture(scope="module")
def recalled(run: Any, recall_model: str, tokenizer: Any) -> dict[str, int]:
    """Right answers of each recipe, of 24 over every depth, at 512 of 8,192 tokens."""
    prompts = needle_questions(tokenizer, CONTEXT, NEEDLES, seed=3)
    found = {}
    for policy in ("channels", "simhash", "quest", "streaming"):
        result = run(
            {
                "kvplug": {"policy": policy, "budget": 512, "dense_below": 0},
                "engine": {"model": recall_model, "block_size": 32, "max_model_len": 8704,
                           "max_num_batched_tokens": 2048},
                "rounds": [[{"ids": prompt.token_ids, "max_tokens": 4}] for prompt in prompts],
            }
        )  # fmt: skip
        found[policy] = sum(
            tokenizer.decode(served[0]["tokens"]).strip() == prompt.expected
            for served, prompt in zip(result["rounds"], prompts, strict=True)
        )
    return found


@pytest.mark.parametrize("policy", ["channels", "simhash"])
def test_a_recipe_that_knows_every_token_recalls_all(recalled, policy):
    assert recalled[policy] == NEEDLES


def test_streaming_recalls_only_what_is_near(recalled):
    """The floor: were it to recall more, the engine would not be using the selection."""
    assert recalled["streaming"] <= NEEDLES * (512 + 256 + 64) // CONTEXT + 2


def test_quest_retrieves_something(recalled):
    assert recalled["quest"] > recalled["streaming"]
