"""Rule 4 in a real engine: same request, same windows, same pages, same answer.

Compared are not only tokens, which the recall model's wide margins would forgive, but every
window's selected pages in every layer and head.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.models.documents import needle_prompt

pytestmark = pytest.mark.engine
WINDOW = 128
OPTIONS = {"policy": "simhash", "budget": 256, "local": 128, "window": WINDOW, "dense_below": 0}
LENGTH = 2_900  # not a multiple of the window: the last one is partial
DECODED = 40


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """Eight documents; the first is the one that is compared."""
    return [
        needle_prompt(tokenizer, LENGTH + 150 * n, depth=0.4, seed=40 + n).token_ids
        for n in range(8)
    ]


def spec(model: str, rounds: list[list[list[int]]], chunk: int = 1024, **engine: Any) -> Any:
    """A spec that serves lists of prompts."""
    return {
        "kvplug": OPTIONS,
        "engine": {
            "model": model, "block_size": 32, "max_model_len": 4096,
            "max_num_batched_tokens": chunk, **engine,
        },
        "rounds": [
            [{"ids": ids, "max_tokens": DECODED} for ids in served] for served in rounds
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(run: Any, recall_model: str, prompts: list[list[int]]) -> Any:
    """The first prompt served alone and cold."""
    return run(spec(recall_model, [prompts[:1]]))


def same_windows(alone: Any, other: Any) -> None:
    """Every selection that ``alone`` made was made again."""
    assert len(alone["selections"]) > DECODED
    for window, layers in alone["selections"].items():
        for pages in layers:
            assert pages in other["selections"].get(window, []), f"window {window} differs"


@pytest.mark.parametrize("chunk", [512, 700, 2048])
def test_chunk_limit_does_not_matter(run, recall_model, prompts, alone, chunk):
    other = run(spec(recall_model, [prompts[:1]], chunk))
    assert other["rounds"][0][0]["tokens"] == alone["rounds"][0][0]["tokens"]
    assert other["selections"] == alone["selections"]


def test_batch_does_not_matter(run, recall_model, prompts, alone):
    other = run(spec(recall_model, [prompts]))
    assert other["rounds"][0][0]["tokens"] == alone["rounds"][0][0]["tokens"]
    same_windows(alone, other)


def test_prefix_hit_does_not_matter(run, recall_model, prompts, alone):
    """The second request hits all whole windows of the first one's prompt."""
    other = run(spec(recall_model, [prompts[:1], prompts[:1]]))
    first, second = other["rounds"][0][0], other["rounds"][1][0]
    assert second["cached"] == LENGTH // WINDOW * WINDOW
    assert first["tokens"] == second["tokens"] == alone["rounds"][0][0]["tokens"]
    for window, layers in alone["selections"].items():
        again = other["selections"][window]
        assert again[: len(layers)] == layers
        assert again[len(layers) :] in ([], layers), f"window {window} differs on the hit"


def test_partial_prefix_hit_is_cut_to_windows(run, recall_model, prompts, alone):
    """A shorter prompt ends inside a window; what it leaves there must not be reused."""
    shorter = prompts[0][: LENGTH - 3 * WINDOW // 2]
    other = run(spec(recall_model, [[shorter], prompts[:1]]))
    assert other["rounds"][1][0]["cached"] % WINDOW == 0
    assert other["rounds"][1][0]["tokens"] == alone["rounds"][0][0]["tokens"]
    same_windows(alone, other)


def test_preemption_does_not_matter(run, recall_model, prompts, alone):
    """Preempted while decoding: the prompt is redone in windows, the rest token by token."""
    blocks = sum(-(-len(ids) // 32) for ids in prompts[:3]) + 2  # room for one more page
    other = run(spec(recall_model, [prompts[:3]], num_gpu_blocks_override=blocks,
                     enable_prefix_caching=False))  # fmt: skip
    cold = run(spec(recall_model, [prompts[:3]], enable_prefix_caching=False))
    assert other["preempted"] > 0
    assert [r["tokens"] for r in other["rounds"][0]] == [r["tokens"] for r in cold["rounds"][0]]
    for window, layers in other["selections"].items():
        for pages in layers:
            assert pages in cold["selections"].get(window, []), f"window {window} differs"
