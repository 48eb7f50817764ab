"""Places vLLM's paged cache in the cold store, sizes it, and fails requests that lose pages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from kvplug.errors import KvplugError
from kvplug.offload.pools import Pools
from kvplug.patches.record import Patch
from kvplug.selection import is_selected, options_of

if TYPE_CHECKING:
    from kvplug.config import OffloadConfig
    from kvplug.offload.cold_store import ColdStore
    from kvplug.offload.host_store import HostStore

STORE, POOLS, HOST_STORE = "kvplug_cold_store", "kvplug_pools", "kvplug_host_store"
"""Attributes of a model runner whose cache is in a cold store; the last one's is a GPU's."""


def offload_of(vllm_config: Any) -> OffloadConfig | None:
    """Where an engine's pages live that are not hot; None without kvplug or without offloading."""
    return options_of(vllm_config).offload if is_selected(vllm_config) else None


class InStore(TorchFunctionMode):
    """While it lasts, vLLM's one allocation of the cache comes from a store.

    Args:
        store: The store.
    """

    def __init__(self, store: ColdStore | HostStore) -> None:
        """Holds the store."""
        super().__init__()
        self.store = store

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces zeros of bytes by the store's."""
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") == torch.int8:
            return self.store.allocate(int(args[0]))
        return func(*args, **kwargs)


def _wrap_allocation(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _maybe_get_memory_pool_context(self: Any, tag: str) -> Any:
        offload = offload_of(self.vllm_config)
        if offload is None or tag != "kv_cache":
            return original(self, tag)
        from kvplug.attention.backend import KvplugBackend
        from kvplug.offload.cold_store import ColdStore

        store = KvplugBackend.cold_store(offload, self.vllm_config.parallel_config.rank)
        is_on_cpu = isinstance(store, ColdStore)
        if is_on_cpu and self.use_v2_model_runner:
            raise KvplugError(
                "kvplug does not offload with vLLM's V2 model runner on CPUs, which cannot fail "
                "requests that lose pages: set VLLM_USE_V2_MODEL_RUNNER=0."
            )
        setattr(self.model_runner, STORE if is_on_cpu else HOST_STORE, store)
        return InStore(store)

    return _maybe_get_memory_pool_context


def _wrap_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def determine_available_memory(self: Any) -> int:
        if offload_of(self.vllm_config) is None:
            return int(original(self))
        if self._should_warm_up_model():
            self.model_runner.warming_up_model()
        return int(self.cache_config.kv_cache_memory_bytes)

    return determine_available_memory


def _wrap_sampling(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, STORE):
            pools = pools_of(self)
            lost = pools.take_unreadable()
            if lost:
                report(self, lost)
        return original(self, *args, **kwargs)

    return sample_tokens


def pools_of(runner: Any) -> Pools:
    """The pools of a runner's layers, collected once."""
    if not hasattr(runner, POOLS):
        from kvplug.observe.exporter import EXPORTER
        from kvplug.observe.pool_metrics import pool_metrics

        context = runner.compilation_config.static_forward_context
        found = [getattr(getattr(layer, "impl", None), "hot", None) for layer in context.values()]
        offload = offload_of(runner.vllm_config)
        assert offload is not None
        pools = Pools(pool for pool in found if pool is not None)
        EXPORTER.add(pools, pool_metrics(offload.tier))
        setattr(runner, POOLS, pools)
    return getattr(runner, POOLS)


def report(runner: Any, pages: set[int]) -> None:
    """Tells the scheduler which blocks are lost; it fails the requests that hold them.

    Raises:
        KvplugError: The scheduler does not hear this worker; the engine must end.
    """
    from vllm.v1.outputs import KVConnectorOutput

    if runner.vllm_config.parallel_config.world_size > 1:
        raise KvplugError(f"kvplug could not read {len(pages)} pages from the cold store.")
    output = runner.kv_connector_output or KVConnectorOutput()
    output.invalid_block_ids = output.invalid_block_ids | pages
    runner.kv_connector_output = output


_VLLM = ">=0.32,<0.33"

PATCHES = [
    Patch(
        target="vllm.v1.worker.gpu_worker:Worker._maybe_get_memory_pool_context",
        vllm=_VLLM,
        why="vLLM allocates the paged cache in the device's memory; a plugin has no say in where. "
        "Its worker asks here for what to allocate in, whichever model runner it has.",
        upstream="https://github.com/vllm-project/vllm/issues/42449",
        remove_when="A plugin can give the context that the cache is allocated in.",
        fingerprint="c6dca1b30ec89d3e",
        wrap=_wrap_allocation,
    ),
    Patch(
        target="vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory",
        vllm=_VLLM,
        why="vLLM refuses a cache that is larger than the memory that is free.",
        upstream="https://github.com/vllm-project/vllm/issues/42449",
        remove_when="A plugin can say how large the cache may be.",
        fingerprint="6307aefccd79f744",
        wrap=_wrap_memory,
        device="cpu",
    ),
    Patch(
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
        vllm=_VLLM,
        why="Pages that cannot be read back must fail their requests and no others; vLLM hears of "
        "lost blocks from KV connectors only.",
        upstream="https://github.com/vllm-project/vllm/issues/42449",
        remove_when="An attention backend can report lost blocks.",
        fingerprint="047e6a4738dead56",
        wrap=_wrap_sampling,
        device="cpu",
    ),
]
