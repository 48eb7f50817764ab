"""How a kernel of vLLM's packs a page: found by writing numbers through its own op and looking."""

from __future__ import annotations

import numpy as np
import torch
from vllm import _custom_ops as ops

from kvplug.page_reader import BITS, Packing

DIGIT = 3
"""Bits of a place that are written at a time: even 8-bit floats hold 0 to 7 exactly."""


QUANTISED = {
    "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
"""vLLM's name of a cache type -> what its bytes are."""


def numbers_of(cache: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """The cache as what its bits mean: vLLM calls 8-bit floats bytes."""
    return cache.view(QUANTISED[kv_cache_dtype]) if kv_cache_dtype in QUANTISED else cache


def find_packing(
    page: int, dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, isa: str, kv_cache_dtype: str
) -> Packing | None:
    """Where the kernel puts every number of a page of one KV head.

    Args:
        page: Tokens per page, P.
        dim: Head dimension, D.
        dtype: Of keys and values.
        cache_dtype: Of the cache.
        isa: vLLM's name of the kernel's instruction set.
        kv_cache_dtype: vLLM's name of the cache's type.

    Returns:
        None where the type is none that can be read, or where the page does not hold every number
        exactly once.
    """
    count = page * dim
    cache = torch.zeros((1, 1, 2 * page, dim), dtype=cache_dtype)
    numbers = numbers_of(cache, kv_cache_dtype)
    if numbers.dtype not in BITS:
        return None
    keys, values = cache.chunk(2, dim=2)
    number = torch.arange(2 * count)
    found = torch.zeros(2 * count, dtype=torch.int64)
    for shift in range(0, (2 * count - 1).bit_length(), DIGIT):
        digit = (number >> shift & (1 << DIGIT) - 1).to(dtype).view(2, page, 1, dim)
        ops.cpu_attn_reshape_and_cache(
            digit[0], digit[1], keys, values, torch.arange(page), isa, kv_cache_dtype=kv_cache_dtype
        )
        found += numbers.flatten().float().long() << shift
    places = torch.argsort(found)
    if not torch.equal(found[places], number):
        return None
    own, theirs = places.view(2, page, dim).to(torch.int32).numpy()
    return Packing(np.ascontiguousarray(own.T).ravel(), theirs.ravel())
