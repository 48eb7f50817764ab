"""What happens to an engine that selects kvplug: checked, adopted, bound, verified.

``adopt`` runs where vLLM completes its config, before any process or weight; ``bind_layers`` runs
in each worker once the KV cache exists.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kvplug.errors import KvplugError
from kvplug.observe.trace import check_path
from kvplug.observe.worker import EXTENSION
from kvplug.offload.setup import adopt_offload, find_events, make_pools
from kvplug.selection import (
    DEFAULT_PAGE,
    is_selected,
    options_of,
)

if TYPE_CHECKING:
    from kvplug.config import KvplugConfig
    from kvplug.observe.observers import Observers
    from kvplug.policies.base import Stages
    from kvplug.rotary import Rotary

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
    if page % DEFAULT_PAGE:
        raise KvplugError(
            f"--block-size {page} is kvplug's page size and must be a multiple of {DEFAULT_PAGE}, "
            f"which vLLM's CPU kernel needs."
        )
    config.check_page(page)
    if not _is_on_cpu():
        from kvplug.attention.device.refusals import check_engine

        check_engine(vllm_config, config, stages, page)
    elif stages.attend is not None:
        raise KvplugError(
            f"Option 'attend' {stages.attend!r} chooses a kernel on CUDA, and this is vLLM's CPU "
            f"platform: leave it out."
        )
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


def _check_model(model: Any) -> None:
    """Refuses models without an ordinary decoder KV cache.

    Raises:
        KvplugError: With the reason.
    """
    refusals = {
        "multi-head latent attention (MLA)": model.use_mla,
        "no attention": model.is_attention_free,
        "recurrent (hybrid) layers": model.is_hybrid or model.has_inner_state,
        "an encoder": model.is_encoder_decoder or model.runner_type != "generate",
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
    if vllm_config.kv_transfer_config is not None:
        raise KvplugError(
            "kvplug does not serve with --kv-transfer-config "
            f"({vllm_config.kv_transfer_config.kv_connector}): its index keeps what it knew of a "
            "page's former content when a connector fills the page, and answers would be wrong."
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


def bind_layers(vllm_config: Any, model: Any) -> None:
    """Gives every layer its cache and index, and checks that kvplug is live where it should be.

    Args:
        vllm_config: The engine's.
        model: This worker's part of the model.

    Raises:
        KvplugError: A decoder layer runs another backend, or positions cannot be fixed.
    """
    if not is_selected(vllm_config):
        return
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    from kvplug.attention.backend import KvplugBackend
    from kvplug.attention.rotary_of import rotary_of
    from kvplug.compiled import same_threads, warming_up
    from kvplug.observe.exporter import EXPORTER
    from kvplug.observe.selection_metrics import selection_metrics

    config = options_of(vllm_config)
    model_config = vllm_config.model_config
    dense = config.resolve_dense_layers(model_config.get_total_num_hidden_layers())
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    retrieving = {}
    for name, layer in layers.items():
        if not isinstance(layer.impl, KvplugBackend.get_impl_cls()):
            raise KvplugError(
                f"kvplug is selected, but layer {name} runs {type(layer.impl).__name__}; refusing "
                f"to serve without retrieval."
            )
        layer.impl.is_dense = layer.impl.is_dense or extract_layer_index(name) in dense
        if layer.impl.retrieves:
            retrieving[extract_layer_index(name)] = layer
    everything = (-1, (-1, -1))  # a window of none, on CPU and on CUDA
    if all(layer.impl.sliding_window not in everything for layer in layers.values()):
        raise KvplugError(
            f"Every layer of {model_config.model} has a sliding window, so there is nothing to "
            f"retrieve."
        )
    shapes = _shapes(vllm_config, retrieving)
    rotaries: dict[int, Rotary] = {}  # by table: most models have one for all layers
    pools = make_pools(vllm_config, retrieving)
    observers = _observers(vllm_config, shapes)
    for number, shape in shapes.items():
        layer = retrieving[number]
        scales = (layer._k_scale_float, layer._v_scale_float)
        rotary = None
        if config.positions == "fixed":
            rotary = rotary_of(
                model, layer, f"layer {number}", model_config.get_hidden_size(),
                model_config.dtype, model_config.max_model_len,
            )  # fmt: skip
            rotary = rotaries.setdefault(id(rotary.table), rotary)
        layer.impl.bind(layer.kv_cache, shape, scales, pools.get(number), observers, rotary)
        if number in pools:
            find_events(pools[number], layer.impl.pipeline.common)
    pipelines = {id(layer.impl.pipeline): number for number, layer in retrieving.items()}
    for number in pipelines.values():
        if _is_on_cpu():
            with same_threads(), warming_up():
                warm_up(retrieving[number].impl, shapes[number])
        retrieving[number].impl.pipeline.trace = observers.trace
        EXPORTER.add(retrieving[number].impl.pipeline, selection_metrics())
    _report(vllm_config, layers)
    if not _is_on_cpu():
        from kvplug.attention.device.refusals import UNTRIED

        logger.warning(UNTRIED)


def _observers(vllm_config: Any, shapes: dict[int, Any]) -> Observers:
    """What looks on while layers attend."""
    from kvplug.observe.observers import Observers

    config = options_of(vllm_config)
    head = {
        "model": vllm_config.model_config.tokenizer,
        "policy": config.policy,
        "budget": config.budget,
        "page": vllm_config.cache_config.block_size,
        "layers": sorted(shapes),
        "options": config.options,
    }
    parallel = vllm_config.parallel_config
    # Not data_parallel_rank, which vLLM makes 0 in every engine of a model without experts.
    is_first = parallel.rank == 0 and parallel.data_parallel_index == 0
    return Observers.of(config, head, is_first=is_first)


def _shapes(vllm_config: Any, layers: dict[int, Any]) -> dict[int, Any]:
    """The geometry of each retrieving layer, by the layer's number."""
    from kvplug.stage import LayerShape

    config = options_of(vllm_config)
    shapes = {}
    for rank, (number, layer) in enumerate(sorted(layers.items())):
        impl = layer.impl
        pages, heads, page, width = layer.kv_cache.shape
        shapes[number] = LayerShape(
            num_pages=pages, num_kv_heads=heads, page=page, head_dim=width // 2, layer=number,
            first_kv_head=first_kv_head(vllm_config, heads), seed=config.seed,
            num_heads=impl.num_heads, num_layers=len(layers), rank=rank, window=config.window,
            local=config.local, scale=impl.scale, softcap=impl.logits_soft_cap,
            dense_below=config.dense_below,
        )  # fmt: skip
    return shapes


def warm_up(impl: Any, shape: Any) -> None:
    """Compiles what a step of ``impl``'s pipeline calls, on a made-up layer that is then dropped.

    The made-up layer has its own pipeline: shared memories must not be fed twice.
    """
    import torch

    from kvplug.attention.attend.cpu import SingleHeadCache
    from kvplug.pipeline import Pipeline, sparse_context

    real = impl.pipeline
    pipeline = Pipeline(real.config, shape.page, shape.num_kv_heads)
    pages = sparse_context(pipeline.geometry) // shape.page + 1
    cache = torch.zeros((pages, shape.num_kv_heads, shape.page, 2 * shape.head_dim))
    reader = impl.attend.reader(SingleHeadCache.of(cache.to(impl.cache.keys.dtype)))
    pipeline.warm_up(shape._replace(num_pages=pages), reader)
    if impl.fixed is not None:
        impl.fixed.warm_up()


def first_kv_head(vllm_config: Any, num_kv_heads: int) -> int:
    """Model-wide number of this worker's first KV head, under tensor parallelism."""
    size = vllm_config.parallel_config.tensor_parallel_size
    if size == 1:
        return 0
    from vllm.distributed import get_tensor_model_parallel_rank

    total = vllm_config.model_config.get_total_num_kv_heads()
    copies = max(1, size // total)
    return int(get_tensor_model_parallel_rank() // copies * num_kv_heads)


def _report(vllm_config: Any, layers: dict[str, Any]) -> None:
    """Logs what is live and what the index costs."""
    pipelines = {id(layer.impl.pipeline): layer.impl.pipeline for layer in layers.values()}
    index_bytes = sum(pipeline.nbytes() for pipeline in pipelines.values())
    kv_bytes = sum(layer.kv_cache.nbytes for layer in layers.values())
    config = options_of(vllm_config)
    share = f"1/{kv_bytes / index_bytes:.0f} of" if index_bytes else "none, beside"
    logger.info(
        "kvplug is live: policy %s, budget %d, sink %d, local %d, window %d, page %d, positions "
        "%s; %d of %d layers retrieve; index %.1f MiB, %s %.1f MiB of KV.",
        config.policy, config.budget, config.sink, config.local, config.window,
        vllm_config.cache_config.block_size, config.positions,
        sum(layer.impl.cache is not None for layer in layers.values()),
        len(layers), index_bytes / 2**20, share, kv_bytes / 2**20,
    )  # fmt: skip
