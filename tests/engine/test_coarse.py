"""The coarse merge in a real engine: it is what serves, it answers, and it keeps rule 4."""

from __future__ import annotations

import pytest

from kvplug.models.documents import needle_questions

pytestmark = pytest.mark.engine


def test_coarse_merge_answers(run, recall_model, tokenizer):
    """Eight questions on one document: one by one on its cached prefix, then all at once, cold."""
    prompts = needle_questions(tokenizer, 3000, 8, seed=5)
    requests = [{"ids": prompt.token_ids, "max_tokens": 6} for prompt in prompts]
    result = run(
        {
            "kvplug": {"policy": "hcam", "budget": 512, "local": 128, "dense_below": 0,
                       "options": {"merge": "coarse"}},
            "engine": {"model": recall_model, "block_size": 32, "max_model_len": 4096,
                       "max_num_batched_tokens": 1024},
            "rounds": [[request] for request in requests]
            + [[{**request, "salt": "cold"} for request in requests]],
        }
    )  # fmt: skip
    assert result["coarse"]
    assert result["selections"]
    *alone, together = [[request["tokens"] for request in served] for served in result["rounds"]]
    assert [len(tokens) for tokens in together] == [6] * 8
    assert [served[0] for served in alone] == together
