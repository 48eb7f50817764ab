"""The host's memory as a cold store of a GPU, which is made up; refusals name what to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.utils import platform_utils, torch_utils
from vllm.v1.simple_kv_offload import cuda_mem_ops

from kvplug.errors import KvplugError
from kvplug.offload.cold_store import store_of
from kvplug.offload.host_store import HostStore


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of it: memory that was pinned, and seen."""
    asked: list[Any] = []

    def note(result: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def noted(memory: torch.Tensor) -> Any:
            asked.append(memory.data_ptr())
            return result(memory)

        return noted

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(platform_utils, "is_uva_available", lambda: True)
    monkeypatch.setattr(cuda_mem_ops, "pin_tensor", note(lambda memory: None))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: self.data_ptr() in asked)
    monkeypatch.setattr(torch_utils, "get_accelerator_view_from_cpu_tensor", note(torch.clone))
    return asked


def test_on_cpus_it_is_memory() -> None:
    store = HostStore()
    tensor = store.allocate(4096)
    assert tensor.shape == (4096,)
    assert not tensor.any()
    assert store_of(tensor[5:].view(torch.int8)) is store


def test_a_gpu_sees_pinned_memory(gpu: list[Any]) -> None:
    store = HostStore()
    tensor = store.allocate(4096)
    pinned, seen = gpu
    assert pinned == seen != tensor.data_ptr()
    assert store_of(tensor) is store
    assert store._memory is not None
    assert store._memory.data_ptr() == pinned


def test_more_than_there_is() -> None:
    with pytest.raises(KvplugError, match=r"asks for 1048576\.0 GiB of the host's memory"):
        HostStore().allocate(2**50)


def test_memory_that_cannot_be_pinned(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(memory: torch.Tensor) -> None:
        raise RuntimeError("cudaHostRegister failed: 2")

    monkeypatch.setattr(cuda_mem_ops, "pin_tensor", refuse)
    with pytest.raises(KvplugError, match=r"could not be pinned \(cudaHostRegister failed: 2\)"):
        HostStore().allocate(4096)


def test_memory_that_is_not_pinned_is_not_copied(
    gpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_mem_ops, "pin_tensor", lambda memory: None)
    with pytest.raises(KvplugError, match="torch does not see it"):
        HostStore().allocate(4096)
    assert gpu == []


def test_a_gpu_that_cannot_read_it(gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform_utils, "is_uva_available", lambda: False)
    with pytest.raises(KvplugError, match="needs a GPU that reads the host's memory"):
        HostStore().allocate(4096)
