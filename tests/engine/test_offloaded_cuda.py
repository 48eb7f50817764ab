"""Offloading on the backend for CUDA in vLLM's engine: both model runners answer as without it.

Kernels are interpreted (:mod:`tests.engine.pretended_cuda`), and what would be pinned memory of the
host is the CPU's. The pool is as small as it may be, so prompts are attended in turns; the cache
has so few blocks that the last prompt is written over those before it.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.models.documents import NeedlePrompt, needle_prompt

pytestmark = pytest.mark.engine
OPTIONS = {
    "policy": "quest", "budget": 64, "sink": 32, "local": 64, "window": 32, "dense_below": 160,
}  # fmt: skip
LEAST = 7 * 4 * 32 * 256 * 2 * 2
"""Bytes of 7 pages of 32 tokens, in 4 KV heads of 128 and 2 layers."""
OFFLOAD = {"tier": "host", "hot_gib": 1.1 * LEAST / 2**30, "cold_gib": 0.01}
BLOCKS = 22


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[NeedlePrompt]:
    lengths, depths = (290, 225, 240), (0.3, 0.4, 0.2)
    return [
        needle_prompt(tokenizer, length, depth, seed)
        for seed, (length, depth) in enumerate(zip(lengths, depths, strict=True))
    ]


@pytest.fixture(scope="module")
def serve(run_pretended: Any, recall_model: str, prompts: list[NeedlePrompt]) -> Any:
    """``serve(options, runner)``: two prompts at once, the first again, then the third."""
    first, second, third = ({"ids": prompt.token_ids, "max_tokens": 3} for prompt in prompts)

    def served(options: dict[str, Any], runner: str, **more: Any) -> dict[str, Any]:
        spec = {
            "kvplug": {**OPTIONS, **options},
            "engine": {
                "model": recall_model, "dtype": "float16", "block_size": 32, "max_model_len": 512,
                "max_num_seqs": 4, "max_num_batched_tokens": 160,
                "num_gpu_blocks_override": BLOCKS,
            },
            "rounds": [[first, second], [{**first, "max_tokens": 2}], [third]], **more,
        }  # fmt: skip
        result: dict[str, Any] = run_pretended(spec, runner)
        return result

    return served


@pytest.fixture(scope="module")
def without(serve: Any) -> dict[str, Any]:
    """The same without offloading."""
    result: dict[str, Any] = serve({}, "1")
    assert result["pools"] == []
    return result


@pytest.mark.parametrize("runner", ["1", "0"], ids=["V2", "V1"])
def test_answers_are_those_without(serve, without, prompts, runner):
    """Also selections, and what was found again; pools are sound, and were too small."""
    found = serve({"offload": OFFLOAD}, runner)
    assert found["impls"] == ["DeviceImpl"]
    assert found["rounds"] == without["rounds"]
    assert found["selections"] == without["selections"]
    assert len(found["selections"]) > 8
    assert found["preempted"] == without["preempted"] == 0
    again = found["rounds"][1][0]
    assert again["cached"] > 200
    assert len(found["pools"]) == 2
    lengths = [len(prompts[n].token_ids) for n in (0, 1, 0, 2)]
    written = sum(lengths) - again["cached"] + 2 + 2 + 1 + 2  # the last token is never written
    for counts in found["pools"]:
        assert counts["hits"] > 0
        assert counts["misses"] > counts["evictions"] > 28
        assert counts["turns"] > 12
        assert counts["bytes_read"] == counts["misses"] * 32 * 256 * 2
        assert counts["bytes_written"] == written * 4 * 256 * 2


def test_replayed_graphs_keep_the_pool(serve, without):
    """Graphs are stood in for; a batch of several is attended in turns, whatever its contexts."""
    found = serve({"offload": OFFLOAD, "options": {"graphs": True}}, "1", graphs=True)
    assert found["captured"] == [1, 2, 4]
    assert found["replays"] >= 4
    assert found["rounds"] == without["rounds"]
    assert all(counts["misses"] > counts["evictions"] > 28 for counts in found["pools"])
