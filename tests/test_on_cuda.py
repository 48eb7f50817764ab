"""kvplug's plugin on vLLM's CUDA platform, which is pretended in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvplug.patches.apply import all_patches

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}  # fmt: skip
SERVED: dict[str, dict[str, Any]] = {
    **{f"sm_{a}{b}": {"capability": (a, b)} for a, b in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))},
    **{f"block {size}": {"block_size": size} for size in (32, 64, 128)},
    "heads of 80": {"head_size": 80},
    "sliding window": {"has_sliding_window": True},
}
NOT_SERVED: dict[str, tuple[dict[str, Any], str]] = {
    "sm_75": ({"capability": (7, 5)}, "compute capability"),
    "block 16": ({"block_size": 16}, "block_size"),
    "block 256": ({"block_size": 256}, "block_size"),
    "heads of 512": ({"head_size": 512}, "head_size"),
    "fp8": ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
    "sinks": ({"has_sink": True}, "attention sinks"),
    "prefixes of images": ({"use_mm_prefix": True}, "multimodal"),
    "batch invariance": ({"use_batch_invariant": True}, "batch invariance"),
}
STARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"block": 32, "second_runner": True, "graphs": "FULL_AND_PIECEWISE"}),
    "pages of 64": ({"block_size": 64}, {"block": 64}),
    "eager": ({"enforce_eager": True}, {"graphs": "NONE"}),
    "decode graphs": (
        {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
        {"graphs": "FULL_DECODE_ONLY"},
    ),
    "pages in the host's memory": (
        {"kvplug": {"offload": {"tier": "host", "cold_gib": 5.0}}},
        {"cache_bytes": 5 * 2**30},
    ),
    "stock": ({"attention_backend": None, "additional_config": {}}, {"second_runner": True}),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "blocks of 16": ({"block_size": 16}, "--block-size on CUDA must be one of (32, 64, 128)"),
    "fp8 cache": (
        {"kv_cache_dtype": "fp8"},
        "caches of the model's own dtype on CUDA: use --kv-cache-dtype bfloat16, not fp8.",
    ),
    "another cache": ({"dtype": "float16", "kv_cache_dtype": "bfloat16"}, "float16, not bfloat16."),
    "float32": ({"dtype": "float32"}, "does not serve --dtype float32 on CUDA"),
    "graphs": ({"compilation_config": {"cudagraph_mode": "FULL"}}, "cudagraph_mode FULL on CUDA"),
    "monitor": ({"jit_monitor_mode": "error"}, "--jit-monitor-mode error on CUDA"),
    "pooler": ({"runner": "pooling"}, "has an encoder or a pooler"),
    "offloading": ({"kv_offloading_size": 1.0}, "does not serve with --kv-offloading-size"),
    "connector": (
        {"kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
        "does not serve with --kv-transfer-config (OffloadingConnector)",
    ),
    "drafts": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2,
                                "prompt_lookup_max": 3}},
        "does not serve --speculative-config on CUDA",
    ),
    "microbatches": ({"enable_dbo": True}, "does not serve microbatches"),
    "cold pages": (
        {"kvplug": {"offload": {"tier": "disk", "path": "."}}}, "tier 'disk' runs on CPUs only",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process found."""
    model = tmp_path_factory.mktemp("model")
    Path(model, "config.json").write_text(json.dumps(MODEL))
    spec = {
        "model": str(model),
        "selectors": {**SERVED, **{name: changed for name, (changed, _) in NOT_SERVED.items()}},
        "engines": {name: given for name, (given, _) in {**STARTS, **REFUSED}.items()},
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretended_platform"], input=json.dumps(spec), text=True,
        capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def test_the_patches_apply_and_import_nothing_of_the_cpu_worker(found: dict[str, Any]) -> None:
    """That replaces torch's streams, events and pinned memory, kvplug selected or not."""
    assert found["torch_is_untouched"]
    assert found["patched"] == sorted(patch.target for patch in all_patches("cuda"))
    assert len(found["patched"]) > 10
    assert not any("cpu" in target for target in found["patched"])


@pytest.mark.parametrize("name", SERVED)
def test_vllm_takes_the_backend(found: dict[str, Any], name: str) -> None:
    assert found["selected"][name] == "kvplug.attention.device.backend.DeviceBackend"


@pytest.mark.parametrize("name", NOT_SERVED)
def test_vllm_says_why_not(found: dict[str, Any], name: str) -> None:
    reasons = found["selected"][name].partition("Reason:")[2]
    assert NOT_SERVED[name][1] in reasons
    assert "," not in reasons


@pytest.mark.parametrize("name", STARTS)
def test_engines_that_start(found: dict[str, Any], name: str) -> None:
    assert found["engines"][name].items() >= STARTS[name][1].items()


@pytest.mark.parametrize("name", REFUSED)
def test_engines_that_are_refused(found: dict[str, Any], name: str) -> None:
    assert REFUSED[name][1] in found["engines"][name]
