"""The backend for CUDA in vLLM's engine: it selects and answers as the one for CPUs does.

Kernels are interpreted (:mod:`tests.engine.pretended_cuda`). Prompts are chunked, some beside
others that decode, contexts below ``dense_below`` stand beside ones above, and a prompt comes back
as a prefix.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.models.documents import NeedlePrompt, needle_prompt

pytestmark = pytest.mark.engine
OPTIONS = {"budget": 64, "sink": 32, "local": 64, "window": 32, "dense_below": 160}
CASES = {
    "channels": ({"policy": "channels"}, "1"),
    "actqkv": ({"policy": "actqkv"}, "1"),
    "first model runner": ({"policy": "quest"}, "0"),
}


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[NeedlePrompt]:
    """Whose answers lie in far pages of all but the last, which is dense at first."""
    lengths, depths = (421, 290, 140), (0.3, 0.5, 0.2)
    return [
        needle_prompt(tokenizer, length, depth, seed)
        for seed, (length, depth) in enumerate(zip(lengths, depths, strict=True))
    ]


@pytest.fixture(scope="module", params=CASES)
def engines(
    request: Any, run: Any, run_pretended: Any, recall_model: str, prompts: list[NeedlePrompt]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the backend for CUDA made of a schedule, and what the one for CPUs did."""
    options, runner = CASES[request.param]
    requests = [{"ids": prompt.token_ids, "max_tokens": 4} for prompt in prompts]
    if request.param != "channels":  # interpreting takes long
        requests = requests[1:]
    spec = {
        "kvplug": {**OPTIONS, **options},
        "engine": {
            "model": recall_model, "dtype": "float16", "block_size": 32, "max_model_len": 512,
            "max_num_seqs": 4, "max_num_batched_tokens": 160,
        },
        "rounds": [requests, [{**requests[0], "max_tokens": 2}]],
    }  # fmt: skip
    return run_pretended(spec, runner), run(spec)


def test_it_is_the_other_backend(engines):
    assert [engine["impls"] for engine in engines] == [["DeviceImpl"], ["KvplugImpl"]]


def test_answers_are_the_same(engines):
    on_cuda, on_cpu = (
        [[served["tokens"] for served in served_at_once] for served_at_once in engine["rounds"]]
        for engine in engines
    )
    assert on_cuda == on_cpu
    assert on_cuda[1][0] == on_cuda[0][0][:2]


@pytest.mark.parametrize("engines", ["channels"], indirect=True)
def test_channels_find_every_needle(engines, prompts, tokenizer):
    found = [tokenizer.decode(served["tokens"]) for served in engines[0]["rounds"][0]]
    assert found == [prompt.expected for prompt in prompts]


def test_whole_windows_are_found_again(engines, prompts):
    on_cuda, on_cpu = (engine["rounds"][1][0]["cached"] for engine in engines)
    assert on_cuda == on_cpu > 200


def test_every_window_selects_the_same_pages(engines):
    on_cuda, on_cpu = (
        {
            window: sorted([sorted(head) for head in layer] for layer in layers)
            for window, layers in engine["selections"].items()
        }
        for engine in engines
    )
    assert len(on_cpu) > 8
    assert on_cuda == on_cpu
