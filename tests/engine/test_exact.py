"""Rules 2, 3 and 7 in a real engine: where kvplug changes nothing, it changes nothing at all."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kvplug.models.documents import random_tokens

pytestmark = pytest.mark.engine
EVERYTHING = {"policy": "simhash", "budget": 1_000_000, "dense_below": 0}


def copying_prompts(tokenizer: Any, count: int, longest: int, shared: int) -> list[list[int]]:
    """Random tokens whose end repeats their beginning: the model must go on copying.

    Every other prompt begins with the same ``shared`` tokens, so prefix hits happen.
    """
    draw = random.Random(4)
    common = random_tokens(tokenizer, shared, seed=1)
    prompts = []
    for number in range(count):
        body = random_tokens(tokenizer, draw.randint(40, longest), seed=100 + number)
        prompts.append((common if number % 2 else []) + body + body[:8])
    return prompts


def batches(prompts: list[list[int]], size: int, tokens: int) -> list[list[dict[str, Any]]]:
    """Rounds of ``size`` requests."""
    requests = [{"ids": ids, "max_tokens": tokens} for ids in prompts]
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def spec(model: str, options: dict[str, Any] | None, rounds: Any, **engine: Any) -> dict[str, Any]:
    """A spec with this file's defaults."""
    arguments = {
        "model": model, "block_size": 32, "max_model_len": 4096, "max_num_batched_tokens": 512,
        **engine,
    }  # fmt: skip
    return {"kvplug": options, "engine": arguments, "rounds": rounds}


def tokens(result: dict[str, Any]) -> list[list[list[int]]]:
    """Token ids of every request of every round."""
    return [[request["tokens"] for request in served] for served in result["rounds"]]


def test_everything_selected_equals_stock(run, recall_model, tokenizer):
    """200 prompts of mixed lengths, in batches, chunked prefill, prefix hits."""
    rounds = batches(copying_prompts(tokenizer, 200, 1500, 700), 25, 12)
    stock = run(spec(recall_model, None, rounds))
    ours = run(spec(recall_model, EVERYTHING, rounds))
    assert tokens(ours) == tokens(stock)
    assert ours["impls"] == ["KvplugImpl"]
    assert stock["impls"] == ["CPUAttentionBackendImpl"]
    hits = [request["cached"] for served in ours["rounds"] for request in served]
    assert max(hits) >= 512
    assert all(hit % 256 == 0 for hit in hits)


def test_everything_selected_equals_stock_under_preemption(run, recall_model, tokenizer):
    """A cache too small for the batch: requests are preempted and come back."""
    rounds = batches(copying_prompts(tokenizer, 16, 900, 0), 16, 160)
    small = {"max_num_batched_tokens": 2048}
    stock = run(spec(recall_model, None, rounds, num_gpu_blocks_override=224, **small))
    ours = run(spec(recall_model, EVERYTHING, rounds, num_gpu_blocks_override=224, **small))
    assert ours["preempted"] > 0
    assert stock["preempted"] > 0
    assert tokens(ours) == tokens(stock)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"policy": "dense", "dense_below": 0}, id="dense recipe"),
        pytest.param({"policy": "simhash", "budget": 64}, id="below dense_below"),
        pytest.param({"budget": 64, "dense_below": 0, "dense_layers": [0, 1]}, id="dense layers"),
    ],
)
def test_dense_ways_equal_stock(run, recall_model, tokenizer, options):
    """Rule 3: contexts below ``dense_below`` and dense layers take the stock path."""
    rounds = batches(copying_prompts(tokenizer, 12, 1800, 300), 12, 12)
    stock = run(spec(recall_model, None, rounds))
    assert tokens(run(spec(recall_model, options, rounds))) == tokens(stock)


def test_installed_but_not_selected_is_stock(run, recall_model, tokenizer):
    """Rule 7: without the flag, vLLM's own classes serve, and say the same."""
    rounds = batches(copying_prompts(tokenizer, 12, 1800, 300), 12, 12)
    without = run(spec(recall_model, None, rounds), VLLM_PLUGINS="")
    installed = run(spec(recall_model, None, rounds))
    assert installed["impls"] == without["impls"] == ["CPUAttentionBackendImpl"]
    assert installed["rounds"] == without["rounds"]
