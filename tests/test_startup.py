"""Adopting an engine: what kvplug refuses, in one sentence, and the one thing that it changes.

The engine's config is made up: `adopt` reads it by its attributes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvplug.errors import KvplugError
from kvplug.observe.worker import EXTENSION
from kvplug.selection import BACKEND_PATH, is_selected, options_of
from kvplug.startup import adopt


def backend(path: str = BACKEND_PATH, name: str = "CUSTOM") -> SimpleNamespace:
    return SimpleNamespace(name=name, get_path=lambda: path)


def engine(options: dict[str, Any] | None = None, **changed: Any) -> SimpleNamespace:
    """A config that kvplug serves; ``section__field=value`` changes it."""
    model = SimpleNamespace(
        model="some-model", use_mla=False, is_attention_free=False, is_hybrid=False,
        has_inner_state=False, is_encoder_decoder=False, runner_type="generate",
        attention_chunk_size=None,
        hf_text_config=SimpleNamespace(model_type="llama"),
        get_total_num_hidden_layers=lambda: 12,
    )  # fmt: skip
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=backend()),
        additional_config={} if options is None else {"kvplug": options},
        model_config=model,
        cache_config=SimpleNamespace(
            block_size=128, user_specified_block_size=False, kv_offloading_size=None
        ),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=8192, long_prefill_token_threshold=0, max_num_seqs=64
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1,
            tensor_parallel_size=1, worker_extension_cls="",
        ),
    )  # fmt: skip
    config.kv_transfer_config = config.speculative_config = None
    for path, value in changed.items():
        section, _, name = path.partition("__")
        setattr(getattr(config, section), name, value)
    return config


def refusal(config: Any) -> str:
    """What the user reads; a refused engine is left as it was."""
    block = config.cache_config.block_size
    with pytest.raises(KvplugError) as caught:
        adopt(config)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert config.cache_config.block_size == block
    return message


@pytest.mark.parametrize(("given", "page"), [(False, 32), (True, 64)], ids=["default", "given"])
def test_the_block_becomes_one_page(given: bool, page: int) -> None:
    config = engine(cache_config__block_size=64, cache_config__user_specified_block_size=given)
    adopt(config)
    assert config.cache_config.block_size == page
    adopt(config)  # as vLLM may, in each of its processes
    assert config.cache_config.block_size == page


@pytest.mark.parametrize(("given", "kept"), [("", EXTENSION), ("their.Worker", "their.Worker")])
def test_workers_answer_unless_another_extension_is_there(given: str, kept: str) -> None:
    config = engine(parallel_config__worker_extension_cls=given)
    adopt(config)
    assert config.parallel_config.worker_extension_cls == kept


DISK = {"tier": "disk", "path": ".", "hot_gib": 1.0, "cold_gib": 4.0}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"audit": 0.1}, "kvplug option audit"),
        ({"trace": "trace.jsonl"}, "kvplug option trace"),
        ({"options": {"budget": "recall"}}, "Budget 'recall'"),
    ],
)
def test_what_reads_whole_contexts_is_refused_beside_a_disk(
    options: dict[str, Any], what: str
) -> None:
    said = refusal(engine({"policy": "quest", "offload": DISK, **options}))
    assert said.startswith(f"{what} attends to the whole context")


def test_nothing_is_audited_where_everything_is_attended_to() -> None:
    assert "nothing to look at" in refusal(engine({"policy": "dense", "audit": 0.1}))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"policy": "dense"}, "policy 'dense'"),
        ({"policy": "hcam", "options": {"merge": "coarse"}}, "merge 'coarse'"),
        ({"dense_layers": [0]}, "dense_layers"),
        ({"audit": 0.1}, "audit"),
        ({"trace": "trace.jsonl"}, "trace"),
        ({"options": {"budget": "recall"}}, "budget 'recall'"),
    ],
)
def test_fixed_positions_are_refused_beside_original_ones(
    options: dict[str, Any], what: str
) -> None:
    said = refusal(engine({"positions": "fixed", **options}, model_config__uses_mrope=False))
    assert said.startswith("kvplug option positions='fixed' does not go with ")
    assert what in said


def test_fixed_positions_are_refused_where_positions_are_no_numbers() -> None:
    config = engine({"positions": "fixed"}, model_config__uses_mrope=True)
    assert "M-RoPE" in refusal(config)


def test_fixed_positions_are_adopted_with_no_dense_layer() -> None:
    config = engine({"positions": "fixed"}, model_config__uses_mrope=False)
    adopt(config)
    assert options_of(config).resolve_dense_layers(12) == frozenset()


def test_a_trace_needs_a_folder(tmp_path: Path) -> None:
    said = refusal(engine({"trace": str(tmp_path / "no" / "trace.jsonl")}))
    assert "there is no folder" in said


@pytest.mark.parametrize("name", ["OffloadingConnector", "MultiConnector"])
def test_connectors_are_refused(name: str) -> None:
    config = engine()
    config.kv_transfer_config = SimpleNamespace(kv_connector=name)
    assert f"--kv-transfer-config ({name})" in refusal(config)


def test_what_vllm_makes_a_connector_of_is_refused() -> None:
    """It does so after it has shown plugins the config."""
    assert "--kv-offloading-size" in refusal(engine(cache_config__kv_offloading_size=4.0))


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model_config__use_mla": True}, "MLA"),
        ({"model_config__is_attention_free": True}, "no attention"),
        ({"model_config__is_hybrid": True}, "hybrid"),
        ({"model_config__has_inner_state": True}, "recurrent"),
        ({"model_config__is_encoder_decoder": True}, "an encoder"),
        ({"model_config__runner_type": "pooling"}, "an encoder or a pooler"),
        ({"model_config__attention_chunk_size": 8192}, "chunked local attention"),
    ],
    ids=str,
)
def test_models_that_are_refused(changed: dict[str, Any], what: str) -> None:
    message = refusal(engine(**changed))
    assert message.startswith("kvplug serves decoder models with")
    assert what in message.partition("some-model has ")[2]


@pytest.mark.parametrize(
    "hf_config",
    [
        {"model_type": "bloom"},
        {"model_type": "falcon", "alibi": True},
        {"model_type": "mpt", "attn_config": {"alibi": True}},
        {"model_type": "mpt", "attn_config": SimpleNamespace(alibi=True)},
        {"model_type": "jais", "position_embedding_type": "alibi"},
    ],
    ids=["bloom", "falcon", "mpt-dict", "mpt-object", "jais"],
)
def test_alibi_is_refused_in_every_spelling(hf_config: dict[str, Any]) -> None:
    message = refusal(engine(model_config__hf_text_config=SimpleNamespace(**hf_config)))
    assert "ALiBi" in message


def test_alibi_of_real_configs() -> None:
    """As transformers builds them; MPT's nested one has ALiBi by default."""
    from transformers import BloomConfig, FalconConfig, LlamaConfig, MptConfig

    for hf_config in (BloomConfig(), FalconConfig(alibi=True), MptConfig()):
        assert "ALiBi" in refusal(engine(model_config__hf_text_config=hf_config))
    for hf_config in (LlamaConfig(), FalconConfig(alibi=False)):
        adopt(engine(model_config__hf_text_config=hf_config))


@pytest.mark.parametrize(
    "hf_config",
    [
        {"model_type": "falcon", "alibi": False},
        {"model_type": "mpt", "attn_config": {"alibi": False}},
        {"model_type": "bert", "position_embedding_type": "absolute"},
    ],
    ids=["falcon", "mpt", "absolute"],
)
def test_without_alibi_it_is_served(hf_config: dict[str, Any]) -> None:
    adopt(engine(model_config__hf_text_config=SimpleNamespace(**hf_config)))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scheduler_config__max_num_batched_tokens": 255}, "--max-num-batched-tokens 255"),
        ({"scheduler_config__long_prefill_token_threshold": 255}, "--long-prefill-token-threshold"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
    ],
    ids=str,
)
def test_combinations_that_are_refused(changed: dict[str, Any], words: str) -> None:
    message = refusal(engine(**changed))
    assert words in message
    if "255" in message:
        assert "raise it to 256 or more" in message


@pytest.mark.parametrize(
    ("tokens", "threshold", "warned"), [(256, 256, True), (318, 0, True), (319, 257, False)]
)
def test_limits_that_just_do(tokens: int, threshold: int, warned: bool, caplog: Any) -> None:
    """Served; and warned of where 64 decoding requests leave no room for a window of 256."""
    logging.getLogger("vllm").propagate, before = True, logging.getLogger("vllm").propagate
    config = engine(
        scheduler_config__max_num_batched_tokens=tokens,
        scheduler_config__long_prefill_token_threshold=threshold,
    )
    with caplog.at_level("WARNING", "vllm.kvplug"):
        adopt(config)
    logging.getLogger("vllm").propagate = before
    assert ("leave no room for a prefill window" in caplog.text) == warned


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bugdet": 1}, "did you mean 'budget'"),
        ({"budget": 0}, "greater than 0"),
        ({"policy": "simhsh"}, "did you mean 'simhash'"),
        ({"options": {"lst": 1}}, "did you mean 'last'"),
        ({"window": 100}, "multiple of the page size 32"),
        ({"budget": 16}, "at least one page of 32"),
        ({"dense_layers": [12]}, "0 to 11"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    assert words in refusal(engine(options))


@pytest.mark.parametrize("other", [None, backend(name="CPU_ATTN")], ids=["none", "another"])
def test_options_without_the_backend_are_refused(other: Any) -> None:
    message = refusal(engine({}, attention_config__backend=other))
    assert "--attention-backend CUSTOM" in message


def test_a_backend_that_another_plugin_holds_is_refused() -> None:
    message = refusal(engine({}, attention_config__backend=backend("their.Backend")))
    assert "their.Backend" in message
    assert "VLLM_PLUGINS" in message


@pytest.mark.parametrize(
    "other",
    [None, backend(name="CPU_ATTN"), backend("their.Backend")],
    ids=["none", "another", "another plugin's"],
)
def test_an_engine_that_did_not_ask_is_left_alone(other: Any) -> None:
    config = engine(None, attention_config__backend=other, model_config__use_mla=True)
    adopt(config)
    assert not is_selected(config)
    assert config.cache_config.block_size == 128
    assert config.additional_config == {}


def test_a_config_without_a_model_is_left_alone() -> None:
    """vLLM makes such ones in passing."""
    config = engine()
    config.model_config = None
    adopt(config)
    assert config.cache_config.block_size == 128


@pytest.mark.parametrize(
    ("refine", "changed", "words"),
    [
        ("none", "parallel_config.pipeline_parallel_size", "--pipeline-parallel-size 1"),
        ("none", "lora_config", "LoRA adapters"),
        ("none", "use_v2_model_runner", "V2 model runner"),
        ("modularity", "parallel_config.tensor_parallel_size", "refine none"),
    ],
)
def test_engines_that_surprise_cannot_serve(refine: str, changed: str, words: str) -> None:
    """Others can: the model's output matters to no recipe but those that learn from it."""

    def config(options: dict[str, Any]) -> SimpleNamespace:
        made = engine(options)
        made.parallel_config.pipeline_parallel_size = 1
        made.lora_config, made.use_v2_model_runner = None, False
        return made

    options = {"policy": "emllm", "options": {"refine": refine}}
    adopt(config(options))
    refused, served = config(options), config({"policy": "simhash"})
    section, _, name = changed.rpartition(".")
    for made in (refused, served):
        setattr(getattr(made, section) if section else made, name, 2)
    assert words in refusal(refused)
    adopt(served)
