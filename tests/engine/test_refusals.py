"""Bad input at start-up: one clear sentence each, before weights are loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

MODELS: dict[str, dict[str, Any]] = {
    "mla": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "vocab_size": 128,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048, "first_k_dense_replace": 2,
    },
    "alibi": {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": 64,
        "n_layer": 2, "n_head": 4, "vocab_size": 128, "seq_length": 2048,
    },
    "encoder": {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": 128, "max_position_embeddings": 512,
    },
}  # fmt: skip

MULTI = {
    "kv_connector": "MultiConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "connectors": [{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}]
    },
}
CASES = {
    "window not whole pages": (["--window", "100"], "multiple of the page size 32"),
    "budget below a page": (["--budget", "16"], "at least one page of 32 tokens"),
    "chunk below window": (["--max-num-batched-tokens", "128"], "below kvplug's window of 256"),
    "threshold below window": (["--long-prefill-token-threshold", "64"], "below kvplug's window"),
    "connector": (["--kv-transfer-config", json.dumps(MULTI)], "(MultiConnector): its index"),
    "missing layer": (["--dense-layers", "0,7"], "names layer 7"),
    "option of no one": (["--options", '{"lats": 3}'], "did you mean 'last'"),
    "longer than the model": (["--max-model-len", "2000000"], "max_model_len"),
    "mla": ([], "multi-head latent attention"),
    "alibi": ([], "ALiBi"),
    "encoder": ([], "has an encoder"),
}

TRY = """
import json, sys
from kvplug.cli import app
from kvplug.serve import launch
found = {}
for name, arguments in json.loads(sys.stdin.read()).items():
    try:
        app(["serve", *arguments], standalone_mode=False)
        found[name] = ["nothing", "it started"]
    except BaseException as error:
        found[name] = [type(error).__name__, str(error)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refusals(recall_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each case raises; all are tried in one process, none gets as far as an engine."""
    arguments = {}
    for name, (flags, _) in CASES.items():
        model = recall_model
        if name in MODELS:
            folder = tmp_path_factory.mktemp(name)
            Path(folder, "config.json").write_text(json.dumps(MODELS[name]))
            model = str(folder)
            flags = ["--skip-tokenizer-init", *flags]
        arguments[name] = [model, "--block-size", "32", *flags]
    done = subprocess.run(
        [sys.executable, "-c", TRY], input=json.dumps(arguments), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_refused_with_a_sentence(refusals, name):
    kind, message = refusals[name]
    assert CASES[name][1] in message
    assert kind == "KvplugError"
    assert "\n" not in message
    if name != "longer than the model":  # vLLM's own check, with its own words
        assert message.endswith(".")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(["--policy", "simhsh"], "did you mean 'simhash'", id="policy"),
        pytest.param(["--budget", "0"], "budget=0", id="budget"),
        pytest.param(["--window", "-256"], "window=-256", id="window"),
        pytest.param(["--attention-backend", "CUSTOM"], "sets --attention-backend", id="backend"),
    ],
)
def test_command_exits_with_2(flags, words):
    done = subprocess.run(
        [sys.executable, "-m", "kvplug", "serve", "no/model", *flags],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_refuses_when_the_platform_ignores_it(start, recall_model):
    """Rule 6: without the platform patch vLLM would run its own backend and say nothing."""
    spec: dict[str, Any] = {
        "kvplug": {},
        "engine": {"model": recall_model, "block_size": 32, "max_model_len": 1024},
        "rounds": [],
        "sabotage": "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
    }
    done = start(spec)
    assert done.returncode != 0
    assert "refusing to serve without retrieval" in done.stderr


def test_options_without_the_backend_are_refused(start, recall_model):
    spec: dict[str, Any] = {
        "kvplug": None,
        "engine": {
            "model": recall_model, "max_model_len": 1024, "additional_config": {"kvplug": {}},
        },
        "rounds": [],
    }  # fmt: skip
    done = start(spec)
    assert done.returncode != 0
    assert "add --attention-backend CUSTOM" in done.stderr
