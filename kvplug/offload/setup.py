"""Offloading at start-up: checks before anything is loaded, then a pool for each layer."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from kvplug.errors import KvplugError
from kvplug.selection import options_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvplug.config import KvplugConfig, OffloadConfig
    from kvplug.offload.device_pool import DevicePool
    from kvplug.offload.hot_pool import HotPool

GIB = 2**30
logger = logging.getLogger("vllm.kvplug")


def adopt_offload(vllm_config: Any, config: KvplugConfig) -> None:
    """Checks the tiers and gives vLLM's cache the cold store's size.

    Raises:
        KvplugError: A folder that cannot be used, too little room, or a pool too small.
    """
    from kvplug.offload.cold_store import check_folder
    from kvplug.policies import make_stages

    offload, cache = config.offload, vllm_config.cache_config
    assert offload is not None
    stages = make_stages(config.policy, config.options)
    if stages.always_dense:
        raise KvplugError(
            f"Policy {config.policy!r} attends to everything, so no part of its cache is cold: "
            f"leave out offload, or choose another policy."
        )
    if offload.cold_gib < offload.hot_gib:
        raise KvplugError(
            f"kvplug option offload.cold_gib={offload.cold_gib:g} must be at least "
            f"hot_gib={offload.hot_gib:g}: the cold store holds every page."
        )
    if offload.eviction == "event" and not stages.gives("events"):
        raise KvplugError(
            f"kvplug option offload.eviction='event' needs a segment stage, which policy "
            f"{config.policy!r} has not: use 'lru', or policy 'emllm'."
        )
    if offload.eviction == "mass" and not stages.gives("logits"):
        raise KvplugError(
            f"kvplug option offload.eviction='mass' needs scores on the scale of attention logits, "
            f"which policy {config.policy!r} does not give: use 'lru'."
        )
    _check_pool(vllm_config, config)
    nbytes = int(offload.cold_gib * GIB)
    if offload.path is not None:
        check_folder(offload.path, nbytes)
    cache.kv_cache_memory_bytes = nbytes


def _check_pool(vllm_config: Any, config: KvplugConfig) -> None:
    """Refuses a hot pool that could not hold one window's pages.

    Raises:
        KvplugError: With the least size.
    """
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    model, cache = vllm_config.model_config, vllm_config.cache_config
    assert config.offload is not None
    kind = cache.cache_dtype
    dtype = model.dtype if kind == "auto" else STR_DTYPE_TO_TORCH_DTYPE[kind]
    layers = model.get_num_layers(vllm_config.parallel_config)
    layers -= len(config.resolve_dense_layers(model.get_total_num_hidden_layers()))
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    page_bytes = 2 * cache.block_size * model.get_head_size() * dtype.itemsize
    check_slots(config, cache.block_size, heads, max(layers, 1), page_bytes)


def check_slots(
    config: KvplugConfig, page: int, num_kv_heads: int, num_layers: int, page_bytes: int
) -> int:
    """Slots of each layer's pool.

    Args:
        config: The user's options.
        page: Tokens per page.
        num_kv_heads: On this worker.
        num_layers: Layers that retrieve.
        page_bytes: Of a page of one KV head.

    Raises:
        KvplugError: Fewer than one window needs.
    """
    from kvplug.offload.hot_pool import slots_for

    assert config.offload is not None
    slots = slots_for(config.offload.hot_gib, num_layers, page_bytes)
    sizes = page, num_kv_heads, num_layers, page_bytes
    if slots * num_layers * page_bytes < least_hot_bytes(config, *sizes):
        needed = least_hot_gib(config, *sizes)
        raise KvplugError(
            f"kvplug option offload.hot_gib={config.offload.hot_gib:g} is too small: one window's "
            f"pages in {num_layers} layers take {needed:.4f} GiB."
        )
    return slots


def least_hot_bytes(
    config: KvplugConfig, page: int, num_kv_heads: int, num_layers: int, page_bytes: int
) -> int:
    """Bytes of one window's pages in every layer; see :func:`check_slots`."""
    from kvplug.offload.hot_pool import least_slots
    from kvplug.pipeline import region_sizes

    least = least_slots(region_sizes(config, page).max_pages_per_row(), num_kv_heads)
    return least * num_layers * page_bytes


def least_hot_gib(config: KvplugConfig, *sizes: int) -> float:
    """The least ``hot_gib``, rounded up to four digits; arguments as of the above."""
    return math.ceil(least_hot_bytes(config, *sizes) / GIB * 1e4) / 1e4


def make_pools(
    vllm_config: Any, layers: dict[int, Any]
) -> dict[int, HotPool] | dict[int, DevicePool]:
    """A pool for each retrieving layer, where the cache is in a cold store.

    Raises:
        KvplugError: ``hot_gib`` is too small, or more than the device has.
    """
    from kvplug.offload.cold_store import store_of
    from kvplug.offload.host_store import HostStore

    config = options_of(vllm_config)
    if config.offload is None or not layers:
        return {}
    stores = [store_of(layer.kv_cache) for layer in layers.values()]
    if None in stores:
        raise KvplugError(
            "kvplug is to offload, but vLLM put the cache elsewhere; refusing to serve."
        )
    is_remote = isinstance(stores[0], HostStore)
    pools = (_device_pools if is_remote else _pools)(config, config.offload, layers, stores[0])
    hot = sum(pool.nbytes() for pool in pools.values())
    logger.info(
        "kvplug offloads to %s: %.2f GiB of pages in %d layers, %.2f GiB of them hot.",
        config.offload.path or "host memory", config.offload.cold_gib, len(layers), hot / GIB,
    )  # fmt: skip
    return pools


def _slots(config: KvplugConfig, layers: dict[int, Any], kv_cache: Any) -> int:
    """Slots of a layer's pool; see :func:`check_slots`."""
    pages, heads, page, width = kv_cache.shape
    size = page * width * kv_cache.dtype.itemsize
    return min(check_slots(config, page, heads, len(layers), size), pages * heads)


def _pools(
    config: KvplugConfig, offload: OffloadConfig, layers: dict[int, Any], store: Any
) -> dict[int, HotPool]:
    """Pools on CPU."""
    from kvplug.compiled import same_threads, warming_up
    from kvplug.offload.hot_pool import HotPool
    from kvplug.offload.links import Links
    from kvplug.offload.warm_up import warm_up

    caches = {number: layer.kv_cache for number, layer in layers.items()}
    first = next(iter(caches.values()))
    with same_threads(), warming_up():
        warm_up(first, store)
    by_links = offload.eviction == "event" or "events" in offload.prefetch
    links = Links(len(first)) if by_links else None
    pools = {
        number: HotPool(cache, store, _slots(config, layers, cache), links)
        for number, cache in caches.items()
    }
    if "next_layer" in offload.prefetch:
        chain_pools(pools)
    return pools


def _device_pools(
    config: KvplugConfig, offload: OffloadConfig, layers: dict[int, Any], store: Any
) -> dict[int, DevicePool]:
    """Pools on a GPU, whose counts are exported.

    Raises:
        KvplugError: There is no memory left for them.
    """
    import torch

    from kvplug.observe.exporter import EXPORTER
    from kvplug.observe.pool_metrics import pool_metrics
    from kvplug.offload.device_pool import DevicePool
    from kvplug.offload.told_counts import ToldCounts

    caches = {number: layers[number].kv_cache for number in sorted(layers)}
    first = next(iter(caches.values()))
    size = first[0, 0].numel() * first.dtype.itemsize
    told = ToldCounts(len(layers), size, first.device)
    try:
        pools = {
            number: DevicePool(cache, store, _slots(config, layers, cache), told, rank)
            for rank, (number, cache) in enumerate(caches.items())
        }
    except torch.OutOfMemoryError as error:
        raise KvplugError(
            f"The GPU has no memory left for kvplug's hot pools: lower kvplug option "
            f"offload.hot_gib={offload.hot_gib:g}."
        ) from error
    EXPORTER.add(told, pool_metrics(offload.tier))
    return pools


def find_events(pool: HotPool | DevicePool, common: Mapping[type, Any]) -> None:
    """Tells a pool's links where events begin, where the recipe knows events.

    Args:
        pool: One that layers' stages are bound behind.
        common: Memories that layers share, by class.
    """
    from kvplug.segment.base import EventStarts

    if pool.links is not None:
        pool.links.events = common.get(EventStarts)


def chain_pools(pools: dict[int, HotPool]) -> None:
    """Tells each pool which one is the next layer's, where that has as many pages and KV heads.

    Args:
        pools: By the layer's number.

    Raises:
        KvplugError: None has a next one.
    """
    for number, pool in pools.items():
        following = pools.get(number + 1)
        if following is not None and following.shape == pool.shape:
            pool.next = following
    if not any(pool.next for pool in pools.values()):
        raise KvplugError(
            "kvplug option offload.prefetch names 'next_layer', and this model has no two layers "
            "one after the other that retrieve: leave it out."
        )
