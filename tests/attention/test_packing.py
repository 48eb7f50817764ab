"""Pages read back from a cache that vLLM's own op has filled, however its kernel packs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from kvplug.attention.attend import cpu
from kvplug.attention.attend.cpu import CpuAttend, SingleHeadCache
from kvplug.attention.attend.packing import find_packing
from kvplug.workspace import Workspace

PAGES, HEADS = 5, 3


def kernels(dtype: torch.dtype, page: int, dim: int) -> list[str]:
    """What this machine has for such a cache: vLLM's choice, and the plain one beside it."""
    return sorted({_get_attn_isa(dtype, page, dim, "auto"), "vec" if page % 32 == 0 else "vec16"})


CASES = [
    (dtype, page, dim, isa)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for page, dim in ((32, 128), (64, 64), (32, 96), (16, 80))
    for isa in kernels(dtype, page, dim)
]


@pytest.mark.parametrize(("dtype", "page", "dim", "isa"), CASES)
def test_what_is_written_is_read(dtype: torch.dtype, page: int, dim: int, isa: str) -> None:
    packed = torch.zeros(PAGES, HEADS, page, 2 * dim, dtype=dtype)
    single = SingleHeadCache.of(packed)
    key_cache, value_cache = packed.view(PAGES, HEADS, 2 * page, dim).chunk(2, dim=2)
    keys, values = torch.randn(2, PAGES * page, HEADS, dim).to(dtype)
    slots = torch.randperm(PAGES * page)
    ops.cpu_attn_reshape_and_cache(keys[slots], values[slots], key_cache, value_cache, slots, isa)
    kernel = CpuAttend(HEADS, HEADS, dim, dtype, isa, "auto")
    reader, value_reader = kernel.reader(single), kernel.value_reader(single)
    assert reader is not None
    assert value_reader is not None
    rows, workspace = torch.tensor([14, 0, 7, 7]), Workspace()
    read, read_values = reader.read(rows, workspace), value_reader.read(rows, workspace)
    for n, row in enumerate(rows.tolist()):
        tokens = slice(row // HEADS * page, (row // HEADS + 1) * page)
        assert torch.equal(read[n], keys[tokens, row % HEADS].float().T)
        assert torch.equal(read_values[n], values[tokens, row % HEADS].float())


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_quantised_numbers_are_read_with_their_scale(name: str) -> None:
    page, dim, scale = 32, 64, 0.5
    isa = _get_attn_isa(torch.bfloat16, page, dim, name)
    packed = torch.zeros(PAGES, HEADS, page, 2 * dim, dtype=torch.uint8)
    single = SingleHeadCache.of(packed, (scale, 2 * scale))
    key_cache, value_cache = packed.view(PAGES, HEADS, 2 * page, dim).chunk(2, dim=2)
    keys, values = torch.randn(2, PAGES * page, HEADS, dim).bfloat16()
    slots = torch.arange(PAGES * page)
    ops.cpu_attn_reshape_and_cache(
        keys, values, key_cache, value_cache, slots, isa, scale, 2 * scale, name
    )
    kernel = CpuAttend(HEADS, HEADS, dim, torch.bfloat16, isa, name)
    reader, value_reader = kernel.reader(single), kernel.value_reader(single)
    assert reader is not None
    assert value_reader is not None
    read = reader.transposed().read(torch.arange(PAGES * HEADS), Workspace())
    read_values = value_reader.read(torch.arange(PAGES * HEADS), Workspace())
    # Two or three bits of fraction, of which vLLM cuts off or rounds what is behind; and tiny ones.
    step = 1 / 4 if name == "fp8_e5m2" else 1 / 8
    for found, wanted in ((read, keys), (read_values, values)):
        expected = wanted.float().unflatten(0, (PAGES, page)).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(found, expected, rtol=step, atol=2e-2)


def test_a_cache_of_another_type_is_not_read() -> None:
    single = SingleHeadCache.of(torch.zeros(2, 1, 32, 2 * 64, dtype=torch.int16))
    kernel = CpuAttend(1, 1, 64, torch.bfloat16, "vec", "auto")
    assert kernel.reader(single) is None
    assert kernel.value_reader(single) is None


def test_a_kernel_that_loses_numbers_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that keeps keys in another precision, or in a page of its own, would."""
    store = ops.cpu_attn_reshape_and_cache

    def forgetful(keys: torch.Tensor, *rest: Any, **named: Any) -> None:
        keys = keys.clone()
        keys[3, 0, 5] = 0
        store(keys, *rest, **named)

    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", forgetful)
    assert find_packing(32, 64, torch.float32, torch.float32, "vec", "auto") is None


PLAIN = (32, 64, torch.float32, torch.float32, "vec", "auto")


def test_the_packing_is_looked_for_once() -> None:
    first = cpu._packing_of(*PLAIN)
    assert first is cpu._packing_of(*PLAIN)
    assert first is not None
    assert np.array_equal(np.sort(np.concatenate(first)), np.arange(2 * 32 * 64))
