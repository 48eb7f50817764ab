"""How a kernel of vLLM's packs a page: found by writing numbers through its own op and looking."""

from __future__ import annotations

import numpy as np
import torch
from vllm import _custom_ops as ops

from kvplug.page_reader import BITS, Packing

DIGIT = 3
"""Bits of a place that are written at a time: even 8-bit floats hold 0 to 7 exactly."""


def find_packing(page: int, dim: int, dtype: torch.dtype, isa: str) -> Packing | None:
    """Where the kernel puts every number of a page of one KV head.

    Args:
        page: Tokens per page, P.
        dim: Head dimension, D.
        dtype: Of the cache.
        isa: vLLM's name of the kernel's instruction set.

    Returns:
        None where the type is none that can be read, or where the page does not hold every number
        exactly once.
    """
    if dtype not in BITS:
        return None
    count = page * dim
    cache = torch.zeros((1, 1, 2 * page, dim), dtype=dtype)
    keys, values = cache.chunk(2, dim=2)
    number = torch.arange(2 * count)
    found = torch.zeros(2 * count, dtype=torch.int64)
    for shift in range(0, (2 * count - 1).bit_length(), DIGIT):
        digit = (number >> shift & (1 << DIGIT) - 1).to(dtype).view(2, page, 1, dim)
        ops.cpu_attn_reshape_and_cache(digit[0], digit[1], keys, values, torch.arange(page), isa)
        found += cache.flatten().long() << shift
    places = torch.argsort(found)
    if not torch.equal(found[places], number):
        return None
    own, theirs = places.view(2, page, dim).to(torch.int32).numpy()
    return Packing(np.ascontiguousarray(own.T).ravel(), theirs.ravel())
