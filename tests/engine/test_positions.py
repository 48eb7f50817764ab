"""Fixed positions in a real engine: answers past what the model knows, and rule 4.

The short recall model loses what is more than some hundred tokens back, by vLLM's own attention
(``tests/models/test_recall.py``). Its documents here have 3,000.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from kvplug.models.documents import needle_questions
from kvplug.models.recall import short_recall_model_path

pytestmark = pytest.mark.engine
OFFLOAD = {"tier": "host", "hot_gib": 0.01, "cold_gib": 0.25}


def spec(offload: dict[str, Any] | None) -> dict[str, Any]:
    """Eight questions on one document: one by one on its cached prefix, then all at once, cold."""
    model = short_recall_model_path()
    prompts = needle_questions(AutoTokenizer.from_pretrained(model), 3000, 8, seed=5)
    requests = [{"ids": prompt.token_ids, "max_tokens": 6} for prompt in prompts]
    options: dict[str, Any] = {
        "positions": "fixed", "budget": 512, "local": 128, "window": 128, "dense_below": 200,
    }  # fmt: skip
    if offload is not None:
        options["offload"] = offload
    return {
        "kvplug": options,
        "engine": {"model": str(model), "block_size": 32, "max_model_len": 4096,
                   "max_num_batched_tokens": 1024},
        "rounds": [[request] for request in requests]
        + [[{**request, "salt": "cold"} for request in requests]],
    }  # fmt: skip


@pytest.mark.parametrize("offload", [None, OFFLOAD], ids=["memory", "offload"])
def test_answers_far_beyond_the_trained_window(run, offload):
    asked = spec(offload)
    model = short_recall_model_path()
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = needle_questions(tokenizer, 3000, 8, seed=5)
    result = run(asked)
    *alone, together = [[request["tokens"] for request in served] for served in result["rounds"]]
    for tokens, prompt in zip(together, prompts, strict=True):
        assert tokenizer.decode(tokens).startswith(prompt.expected)
    assert [served[0] for served in alone] == together
    assert result["selections"]
    assert [served[0]["cached"] > 2000 for served in result["rounds"][1:-1]] == [True] * 7
    assert bool(result["pools"]) == (offload is not None)
    assert all(pool["evictions"] > 0 for pool in result["pools"])
