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
    few = prompts if request.param == "channels" else prompts[1:]  # interpreting takes long
    spec = schedule(recall_model, few, options)
    return run_pretended(spec, runner), run(spec)


def schedule(model: str, prompts: list[NeedlePrompt], options: dict[str, Any]) -> dict[str, Any]:
    """All prompts at once, then the first of them again."""
    requests = [{"ids": prompt.token_ids, "max_tokens": 4} for prompt in prompts]
    return {
        "kvplug": {**OPTIONS, **options},
        "engine": {
            "model": model, "dtype": "float16", "block_size": 32, "max_model_len": 512,
            "max_num_seqs": 4, "max_num_batched_tokens": 160,
        },
        "rounds": [requests, [{**requests[0], "max_tokens": 2}]],
    }  # fmt: skip


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
    assert on_cuda == on_cpu >= 192


def test_every_window_selects_the_same_pages(engines):
    on_cuda, on_cpu = (
        {
            window: sorted([sorted(head) for head in layer] for layer in layers)
            for window, layers in engine["selections"].items()
        }
        for engine in engines
    )
    assert len(on_cpu) >= 7
    assert on_cuda == on_cpu


def test_replayed_graphs_answer_the_same(run, run_pretended, recall_model, prompts, tokenizer):
    """Graphs are stood in for: kernels and operators of a captured step, called again."""
    with_graphs = {"policy": "channels", "options": {"graphs": True}}
    spec = {**schedule(recall_model, prompts[1:], with_graphs), "graphs": True}
    replayed, on_cpu = run_pretended(spec, "1"), run(schedule(recall_model, prompts[1:], {}))
    assert replayed["captured"] == [1, 2, 4]
    assert replayed["replays"] >= 4
    assert replayed["rounds"] == on_cpu["rounds"]
    found = [tokenizer.decode(served["tokens"]) for served in replayed["rounds"][0]]
    assert found == [prompt.expected for prompt in prompts[1:]]
