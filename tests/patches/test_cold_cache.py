"""vLLM's cache is allocated in the store of the platform's backend, and nothing else is."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvplug.attention import backend
from kvplug.attention.cpu_backend import CpuBackend
from kvplug.attention.device.backend import DeviceBackend
from kvplug.errors import KvplugError
from kvplug.offload.cold_store import ColdStore, store_of
from kvplug.offload.host_store import HostStore
from kvplug.patches import cold_cache
from tests.test_startup import engine

HOST = {"tier": "host", "cold_gib": 1.0, "hot_gib": 0.5}
ORIGINAL = nullcontext()
context_for = cold_cache._wrap_allocation(lambda self, tag: ORIGINAL)


def worker(offload: dict[str, Any] | None, **changed: Any) -> Any:
    options = {} if offload is None else {"offload": offload}
    made = SimpleNamespace(
        vllm_config=engine(options), model_runner=SimpleNamespace(), use_v2_model_runner=False
    )
    made.vllm_config.parallel_config.rank = 0
    return SimpleNamespace(**{**vars(made), **changed})


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize(
    ("taken", "kind", "name"),
    [(CpuBackend, ColdStore, "STORE"), (DeviceBackend, HostStore, "HOST_STORE")],
    ids=["CPU", "CUDA"],
)
def test_bytes_come_from_the_store(
    taken: Any, kind: type[Any], name: str, is_v2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "KvplugBackend", taken)
    made = worker(HOST, use_v2_model_runner=is_v2)
    if is_v2 and taken is CpuBackend:
        with pytest.raises(KvplugError, match="V2 model runner on CPUs"):
            context_for(made, "kv_cache")
        return
    with context_for(made, "kv_cache"):
        cache = torch.zeros(64, dtype=torch.int8, device="cpu")
        other = torch.zeros(64, dtype=torch.int32)
    store = store_of(cache)
    assert isinstance(store, kind)
    assert vars(made.model_runner) == {getattr(cold_cache, name): store}
    assert store_of(other) is None


@pytest.mark.parametrize("tag", ["weights", "runtime"])
def test_other_memory_is_vllms(tag: str) -> None:
    assert context_for(worker(HOST), tag) is ORIGINAL


def test_nothing_changes_without_offloading() -> None:
    assert context_for(worker(None), "kv_cache") is ORIGINAL
    stock = worker(HOST)
    stock.vllm_config.attention_config.backend = None
    stock.vllm_config.additional_config = {}
    assert context_for(stock, "kv_cache") is ORIGINAL
