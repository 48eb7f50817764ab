"""Random-hyperplane signs (Charikar 2002): 64 bits of a vector, for every index that hashes.

Planes come from the user's seed, the layer and the KV head: hashes of different steps are
comparable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled

if TYPE_CHECKING:
    from kvplug.stage import LayerShape

BITS = 64
LANES = 16
"""Floats in a vector register, to estimate work."""
WORDS_PER_VECTOR = 8
"""64-bit words in a vector register, to estimate work."""


def draw_planes(shape: LayerShape) -> torch.Tensor:
    """``[Hk, D, 64]`` float32 Gaussian planes, fixed by seed, layer and model-wide KV head."""
    planes = torch.empty(shape.num_kv_heads, shape.head_dim, BITS)
    for head in range(shape.num_kv_heads):
        key = (shape.seed, shape.layer, shape.first_kv_head + head)
        draw = np.random.default_rng(key).standard_normal((shape.head_dim, BITS), np.float32)
        planes[head] = torch.from_numpy(draw)
    return planes


@njit(cache=True, fastmath={"contract"})
def sign_words(vectors, planes, words):  # type: ignore[no-untyped-def]
    """``words[i] = sign bits of vectors[i]`` for ``vectors [n, D]`` on ``planes [D, 64]``.

    Four vectors share every load of the planes and four dimensions every load of the sums: 4.6
    times as fast as one by one (131,072 tokens x 4 heads in 101 ms on 2 cores, where torch's
    matrix product takes 144 ms). Unlike the latter it adds in one order whatever the batch, so a
    key's word never depends on its neighbours.
    """
    count, dim = vectors.shape
    sums = np.empty((4, 64), dtype=np.float32)
    s0, s1, s2, s3 = sums[0], sums[1], sums[2], sums[3]
    for first in range(0, count, 4):
        last = count - 1
        v0, v1 = vectors[first], vectors[min(first + 1, last)]
        v2, v3 = vectors[min(first + 2, last)], vectors[min(first + 3, last)]
        sums[:] = 0
        for d in range(0, dim - dim % 4, 4):
            p0, p1, p2, p3 = planes[d], planes[d + 1], planes[d + 2], planes[d + 3]
            for b in range(64):
                a0, a1, a2, a3 = p0[b], p1[b], p2[b], p3[b]
                s0[b] = s0[b] + v0[d] * a0 + v0[d + 1] * a1 + v0[d + 2] * a2 + v0[d + 3] * a3
                s1[b] = s1[b] + v1[d] * a0 + v1[d + 1] * a1 + v1[d + 2] * a2 + v1[d + 3] * a3
                s2[b] = s2[b] + v2[d] * a0 + v2[d + 1] * a1 + v2[d + 2] * a2 + v2[d + 3] * a3
                s3[b] = s3[b] + v3[d] * a0 + v3[d + 1] * a1 + v3[d + 2] * a2 + v3[d + 3] * a3
        for d in range(dim - dim % 4, dim):
            for b in range(64):
                s0[b] += v0[d] * planes[d, b]
                s1[b] += v1[d] * planes[d, b]
                s2[b] += v2[d] * planes[d, b]
                s3[b] += v3[d] * planes[d, b]
        for i in range(min(4, count - first)):
            word = np.uint64(0)
            for b in range(64):
                word |= np.uint64(sums[i, b] > 0) << np.uint64(b)
            words[first + i] = word


@compiled()
def probe_words(vectors, counts, planes, words):  # type: ignore[no-untyped-def]
    """``words[w, h, r] = sign bits of vectors[w, h, r]`` on ``planes[h]``, for r < counts[w]."""
    num_kv_heads = vectors.shape[1]
    for task in prange(vectors.shape[0] * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        count = counts[w]
        sign_words(vectors[w, head, :count], planes[head], words[w, head, :count])
