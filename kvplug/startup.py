"""What happens to the config of an engine that selects kvplug, before any process or weight."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kvplug.errors import KvplugError
from kvplug.observe.trace import check_path
from kvplug.observe.worker import EXTENSION
from kvplug.offload.setup import adopt_offload
from kvplug.selection import (
    DEFAULT_PAGE,
    is_selected,
    options_of,
)

if TYPE_CHECKING:
    from kvplug.config import KvplugConfig
    from kvplug.policies.base import Stages

logger = logging.getLogger("vllm.kvplug")


def adopt(vllm_config: Any) -> None:
    """Checks an engine's config and makes one page its block size.

    Args:
        vllm_config: vLLM's ``VllmConfig``, complete but for this.

    Raises:
        KvplugError: Options, model or combination that kvplug cannot serve.
    """
    if not is_selected(vllm_config) or vllm_config.model_config is None:
        return
    from kvplug.policies import make_stages

    config = options_of(vllm_config)
    stages = make_stages(config.policy, config.options)
    _check_model(vllm_config.model_config)
    cache = vllm_config.cache_config
    page = cache.block_size if cache.user_specified_block_size else DEFAULT_PAGE
    if _is_on_cpu():
        _check_on_cpu(stages, page)
    else:
        from kvplug.attention.device.refusals import check_engine

        check_engine(vllm_config, config, stages, page)
    config.check_page(page)
    _check_combination(vllm_config, config.window)
    _check_stages(stages, vllm_config)
    _check_observing(config, stages)
    if config.positions == "fixed":
        _check_positions(config, stages, vllm_config.model_config)
    config.resolve_dense_layers(vllm_config.model_config.get_total_num_hidden_layers())
    cache.block_size = page
    if not vllm_config.parallel_config.worker_extension_cls:
        vllm_config.parallel_config.worker_extension_cls = EXTENSION
    if config.offload is not None:
        adopt_offload(vllm_config, config)


def _is_on_cpu() -> bool:
    """Whether vLLM runs on its CPU platform."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _check_on_cpu(stages: Stages, page: int) -> None:
    """Refuses what vLLM's CPU platform has no kernel for.

    Raises:
        KvplugError: With the reason.
    """
    if page % DEFAULT_PAGE:
        raise KvplugError(
            f"--block-size {page} is kvplug's page size and must be a multiple of {DEFAULT_PAGE}, "
            f"which vLLM's CPU kernel needs."
        )
    if stages.attend is not None:
        raise KvplugError(
            f"Option 'attend' {stages.attend!r} chooses a kernel on CUDA, and this is vLLM's CPU "
            f"platform: leave it out."
        )
    if stages.graphs:
        raise KvplugError(
            "Option 'graphs' is for CUDA graphs, and this is vLLM's CPU platform: leave it out."
        )


def _check_model(model: Any) -> None:
    """Refuses models without an ordinary decoder KV cache.

    Raises:
        KvplugError: With the reason.
    """
    refusals = {
        "multi-head latent attention (MLA)": model.use_mla,
        "no attention": model.is_attention_free,
        "recurrent (hybrid) layers": model.is_hybrid or model.has_inner_state,
        "an encoder": model.is_encoder_decoder,
        "an encoder or a pooler": model.runner_type != "generate",
        "chunked local attention": model.attention_chunk_size is not None,
        "ALiBi position biases": _has_alibi(model.hf_text_config),
    }
    for what, present in refusals.items():
        if present:
            raise KvplugError(
                f"kvplug serves decoder models with multi-head or grouped-query attention; "
                f"{model.model} has {what}."
            )


def _has_alibi(hf_config: Any) -> bool:
    """Whether a Hugging Face config asks for ALiBi, in any of its spellings."""
    attention = getattr(hf_config, "attn_config", None)
    if isinstance(attention, dict):
        nested = attention.get("alibi", False)
    else:
        nested = getattr(attention, "alibi", False)
    return bool(
        getattr(hf_config, "model_type", "") == "bloom"
        or getattr(hf_config, "alibi", False)
        or nested
        or getattr(hf_config, "position_embedding_type", "") == "alibi"
    )


def _check_combination(vllm_config: Any, window: int) -> None:
    """Refuses engine settings under which windows could not stay whole.

    Raises:
        KvplugError: With what to change.
    """
    scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
    limits = {
        "--max-num-batched-tokens": scheduler.max_num_batched_tokens,
        "--long-prefill-token-threshold": scheduler.long_prefill_token_threshold or window,
    }
    for flag, tokens in limits.items():
        if tokens < window:
            raise KvplugError(
                f"{flag} {tokens} is below kvplug's window of {window} tokens: raise it to "
                f"{window} or more."
            )
    if scheduler.max_num_batched_tokens < window + scheduler.max_num_seqs - 1:
        logger.warning(
            "kvplug: with --max-num-batched-tokens %d and --max-num-seqs %d, %d decoding requests "
            "leave no room for a prefill window of %d tokens; prefill then waits for them.",
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
            scheduler.max_num_batched_tokens - window + 1,
            window,
        )
    connector = None
    if vllm_config.kv_transfer_config is not None:
        connector = f"--kv-transfer-config ({vllm_config.kv_transfer_config.kv_connector})"
    elif vllm_config.cache_config.kv_offloading_size is not None:
        connector = "--kv-offloading-size"  # vLLM makes a connector of it later
    if connector is not None:
        raise KvplugError(
            f"kvplug does not serve with {connector}: its index keeps what it knew of a page's "
            "former content when a connector fills the page, and answers would be wrong."
        )
    contexts = (parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    if max(contexts) > 1:
        raise KvplugError("kvplug does not serve decode or prefill context parallelism.")


def _check_stages(stages: Stages, vllm_config: Any) -> None:
    """Refuses engine settings that the recipe's stages cannot work under.

    Raises:
        KvplugError: With the stage and what to change.
    """
    parallel = vllm_config.parallel_config
    if stages.segment and stages.segment.needs_logits and parallel.pipeline_parallel_size > 1:
        raise KvplugError(
            f"Segment {stages.segment.name!r} needs the model's logits, which only the last of "
            f"{parallel.pipeline_parallel_size} pipeline stages has: use "
            f"--pipeline-parallel-size 1 or another policy."
        )
    if stages.segment and stages.segment.needs_logits:
        refusals = {
            "vLLM's V2 model runner": getattr(vllm_config, "use_v2_model_runner", False),
            "LoRA adapters": vllm_config.lora_config is not None,
        }
        for what, present in refusals.items():
            if present:
                raise KvplugError(
                    f"Segment {stages.segment.name!r} needs the model's logits of every prompt "
                    f"token, which kvplug does not get with {what}: choose another policy."
                )
    if stages.segment and stages.segment.needs_every_head and parallel.tensor_parallel_size > 1:
        raise KvplugError(
            f"Segment {stages.segment.name!r} refines events by the keys of all KV heads, which no "
            f"tensor-parallel worker has: use --tensor-parallel-size 1 or refine none."
        )
    margin = stages.hit_margin(1, 1)
    if margin and vllm_config.speculative_config is not None:
        raise KvplugError(
            "This recipe learns from the queries of decoded tokens, and rejected drafts would "
            "stay in what it learned: leave out --speculative-config or choose another policy."
        )


def _check_observing(config: KvplugConfig, stages: Stages) -> None:
    """Refuses exact attention beside nothing, or to cold pages, past the checks for I/O errors.

    Raises:
        KvplugError: With the reason.
    """
    wanted = {
        "kvplug option audit": bool(config.audit),
        "kvplug option trace": config.trace is not None,
        f"Budget {stages.budget.name!r}": stages.budget.audits,
    }
    if config.trace is not None:
        check_path(config.trace)
    for what, asked in wanted.items():
        if asked and stages.always_dense:
            raise KvplugError(
                f"{what} has nothing to look at: policy {config.policy!r} attends to everything."
            )
        if asked and config.offload is not None and config.offload.tier == "disk":
            raise KvplugError(
                f"{what} attends to the whole context now and then, which kvplug does not do with "
                f"offload to disk."
            )


def _check_positions(config: KvplugConfig, stages: Stages, model: Any) -> None:
    """Refuses fixed positions beside what attends to or measures keys where they stand.

    Raises:
        KvplugError: With the reason.
    """
    refusals = {
        f"policy {config.policy!r}, which takes vLLM's own path": stages.always_dense,
        "merge 'coarse', which weighs pages by keys where they stand": stages.merge == "coarse",
        "dense_layers, which take vLLM's own path": config.dense_layers not in ("auto", []),
        "audit, which measures attention to keys where they stand": bool(config.audit),
        "trace, which measures attention to keys where they stand": config.trace is not None,
        f"budget {stages.budget.name!r}, which measures attention to keys where they stand":
            stages.budget.audits,
        "a model whose positions have several dimensions (M-RoPE)": model.uses_mrope,
    }  # fmt: skip
    for what, present in refusals.items():
        if present:
            raise KvplugError(f"kvplug option positions='fixed' does not go with {what}.")
