"""How far a window's queries stand out: their distance from a mean in units of the variance."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import FLOATS, check, check_devices, check_head_dim, require

BLOCK = 4096
"""Numbers of a window's queries that a program loads at a time."""
LONGEST_WINDOW = 8192
"""Tokens of a window whose weights fit a program's registers."""


class QueryWindows(NamedTuple):
    """Queries of a step and how they are cut into ``S`` windows."""

    queries: torch.Tensor
    """``[T, H, D]`` bfloat16, float16 or float32, after the rotary embedding; tokens and heads
    may be strided."""
    token_start: torch.Tensor
    """``[S]`` int32 first query of each window."""
    num_tokens: torch.Tensor
    """``[S]`` int32 queries of each window; 0 in an unused row."""

    def check(self, vectors: torch.Tensor) -> tuple[int, int, int, int]:
        """Refuses what kernels would read wrongly.

        Args:
            vectors: ``[S, Hk, R, D]`` of the queries' dtype or float32.

        Returns:
            S, H, Hk and D.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device.
        """
        windows, heads, dim = self.check_queries()
        own = tuple(dict.fromkeys((self.queries.dtype, torch.float32)))
        check("vectors", vectors, (windows, "Hk", "R", dim), own)
        check_devices(vectors=vectors, queries=self.queries)
        kv_heads = vectors.shape[1]
        require(
            heads % kv_heads == 0,
            f"Query heads must be a multiple of KV heads, not {heads} of {kv_heads}.",
        )
        return windows, heads, kv_heads, dim

    def check_queries(self) -> tuple[int, int, int]:
        """Refuses queries and windows that kernels would read wrongly.

        Returns:
            S, H and D.

        Raises:
            ValueError: A tensor is of another shape, dtype, layout or device.
        """
        check("queries", self.queries, ("T", "H", "D"), FLOATS, contiguous=False)
        _, heads, dim = self.queries.shape
        check_head_dim(dim)
        check("num_tokens", self.num_tokens, ("S",), torch.int32)
        windows = len(self.num_tokens)
        check("token_start", self.token_start, (windows,), torch.int32)
        check_devices(**self._asdict())
        return windows, heads, dim

    def of(self, window: int) -> torch.Tensor:
        """``[c, H, D]`` queries of a window; waits for the device: for references."""
        start = int(self.token_start[window])
        return self.queries[start : start + int(self.num_tokens[window])]


def check_longest(longest: int) -> None:
    """Refuses windows whose weights do not fit a program.

    Raises:
        ValueError: See :data:`LONGEST_WINDOW`.
    """
    require(
        1 <= longest <= LONGEST_WINDOW,
        f"A window must have 1 to {LONGEST_WINDOW} tokens, not {longest}.",
    )


@triton.jit
def window_sums(  # type: ignore[no-untyped-def]
    p_head, stride_token, count, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of one head's ``count`` queries: [BD]."""
    o_d = tl.arange(0, BLOCK_D)
    b_sums = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for t in range(0, count, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_td = (o_t < count)[:, None] & (o_d < D)[None, :]
        p_block = p_head + o_t.to(tl.int64)[:, None] * stride_token + o_d[None, :]
        b_sums += tl.load(p_block, mask=m_td, other=0.0).to(tl.float32)  # [BT, BD]
    return tl.sum(b_sums, 0)


@triton.jit
def window_moments(  # type: ignore[no-untyped-def]
    p_head, stride_token, count, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squared deviations from it, of one head's ``count`` queries: [BD] each."""
    o_d = tl.arange(0, BLOCK_D)
    b_mean = window_sums(p_head, stride_token, count, D, BLOCK_T, BLOCK_D) / count  # [BD]
    b_spread = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for t in range(0, count, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_td = (o_t < count)[:, None] & (o_d < D)[None, :]
        p_block = p_head + o_t.to(tl.int64)[:, None] * stride_token + o_d[None, :]
        b_delta = tl.load(p_block, mask=m_td, other=0.0).to(tl.float32) - b_mean[None, :]
        b_spread += tl.where(m_td, b_delta * b_delta, 0.0)
    return b_mean, tl.sum(b_spread, 0)


@triton.jit
def store_distances(  # type: ignore[no-untyped-def]
    p_queries, stride_token, count, b_mean, b_weight, p_out,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum_d (query_td - mean_d)^2 * weight_d`` for ``count`` queries of one head.

    Mean and weight are ``[BD]``; behind the head size the mean is 0.
    """
    o_d = tl.arange(0, BLOCK_D)
    for t in range(0, count, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_td = (o_t < count)[:, None] & (o_d < D)[None, :]
        p_block = p_queries + o_t.to(tl.int64)[:, None] * stride_token + o_d[None, :]
        b_delta = (
            tl.load(p_block, mask=m_td, other=0.0).to(tl.float32) - b_mean[None, :]
        )  # [BT, BD]
        b_far = tl.sum(b_delta * b_delta * b_weight[None, :], 1)  # [BT]
        tl.store(p_out + o_t, b_far, mask=o_t < count)
