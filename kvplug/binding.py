"""A worker's layers get their caches, indexes, pools and observers, once the KV cache exists."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from kvplug.errors import KvplugError
from kvplug.offload.setup import find_events, make_pools
from kvplug.selection import is_selected, options_of

if TYPE_CHECKING:
    from kvplug.observe.observers import Observers
    from kvplug.rotary import Rotary
    from kvplug.stage import LayerShape

logger = logging.getLogger("vllm.kvplug")


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
    from vllm.platforms import current_platform

    from kvplug.compiled import same_threads, warming_up
    from kvplug.observe.exporter import EXPORTER
    from kvplug.observe.selection_metrics import selection_metrics

    layers = get_layers_from_vllm_config(vllm_config, Attention)
    retrieving = _retrieving(vllm_config, layers)
    shapes = _shapes(vllm_config, retrieving)
    rotaries = _rotaries(vllm_config, model, retrieving)
    pools = make_pools(vllm_config, retrieving)
    observers = _observers(vllm_config, shapes)
    for number, shape in shapes.items():
        layer = retrieving[number]
        scales = (layer._k_scale_float, layer._v_scale_float)
        mine = pools.get(number), observers, rotaries.get(number)
        layer.impl.bind(layer.kv_cache, shape, scales, *mine)
        if number in pools:
            find_events(pools[number], layer.impl.pipeline.common)
    pipelines = {id(layer.impl.pipeline): number for number, layer in retrieving.items()}
    for number in pipelines.values():
        if current_platform.is_cpu():
            with same_threads(), warming_up():
                warm_up(retrieving[number].impl, shapes[number])
        else:
            _warm_up_device(retrieving[number].impl, vllm_config.model_config)
        retrieving[number].impl.pipeline.trace = observers.trace
        EXPORTER.add(retrieving[number].impl.pipeline, selection_metrics())
    _report(vllm_config, layers)
    if not current_platform.is_cpu():
        from kvplug.attention.device.refusals import UNTRIED

        logger.warning(UNTRIED)


def _retrieving(vllm_config: Any, layers: dict[str, Any]) -> dict[int, Any]:
    """The layers that ever attend to less than everything, by number.

    Raises:
        KvplugError: A layer runs another backend, or every layer has a sliding window.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    from kvplug.attention.backend import KvplugBackend

    model = vllm_config.model_config
    dense = options_of(vllm_config).resolve_dense_layers(model.get_total_num_hidden_layers())
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
            f"Every layer of {model.model} has a sliding window, so there is nothing to retrieve."
        )
    return retrieving


def _rotaries(vllm_config: Any, model: Any, layers: dict[int, Any]) -> dict[int, Rotary]:
    """The rotary embedding of each layer, by number, where positions are fixed.

    Raises:
        KvplugError: A layer has none that kvplug can move keys by.
    """
    from kvplug.attention.rotary_of import rotary_of

    if options_of(vllm_config).positions != "fixed":
        return {}
    config = vllm_config.model_config
    by_table: dict[int, Rotary] = {}  # most models have one for all layers
    found = {}
    for number, layer in layers.items():
        rotary = rotary_of(
            model, layer, f"layer {number}", config.get_hidden_size(), config.dtype,
            config.max_model_len,
        )  # fmt: skip
        found[number] = by_table.setdefault(id(rotary.table), rotary)
    return found


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


def _shapes(vllm_config: Any, layers: dict[int, Any]) -> dict[int, LayerShape]:
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
    from kvplug.pages import sparse_context
    from kvplug.pipeline import Pipeline

    real = impl.pipeline
    pipeline = Pipeline(real.config, shape.page, shape.num_kv_heads)
    pages = sparse_context(pipeline.geometry) // shape.page + 1
    cache = torch.zeros((pages, shape.num_kv_heads, shape.page, 2 * shape.head_dim))
    reader = impl.attend.reader(SingleHeadCache.of(cache.to(impl.cache.keys.dtype)))
    pipeline.warm_up(shape._replace(num_pages=pages), reader)
    if impl.fixed is not None:
        impl.fixed.warm_up()


def _warm_up_device(impl: Any, model: Any) -> None:
    """Compiles the kernels of ``impl``'s pipeline, and says how long it took."""
    from kvplug.attention.device.warm_up import warm_up as warm_up_device

    start = time.perf_counter()
    if warm_up_device(impl, model.dtype, model.max_model_len):
        logger.info("kvplug compiled its kernels in %.1f s.", time.perf_counter() - start)


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
