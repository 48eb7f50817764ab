"""A window's mean query, weighted by how far each token stands out from all that came before.

The twin on CPU is :class:`kvplug.probe.activation.ActivationProbe` (ActQKV, Xiao et al. 2025,
arXiv 2502.13542): ``phi = (q - mu)^2 / (var + mean(var) / 100)``, averaged over the dimensions of
the heads that weigh together, raised to a power, and made to sum to 1 over the window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.carried_pages import carried_page, check_carried, physical_page
from kvplug.kernels.checks import check, check_devices, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.distance import BLOCK, QueryWindows, check_longest, store_distances

TINY = 1e-20
"""Variance of a dimension that never varied."""


class Seen(NamedTuple):
    """Statistics of queries before a window, as :class:`kvplug.probe.query_statistics` keeps them.

    They lie on pages; ``before`` says on which one a window finds its own.
    """

    block_table: torch.Tensor
    """``[B, max_pages]`` int32 physical pages; rows may be strided."""
    request: torch.Tensor
    """``[S]`` int32 row of the block table."""
    before: torch.Tensor
    """``[S]`` int32 logical page; a negative one at the start of a request."""
    means: torch.Tensor
    """``[pages, H, D]`` float32."""
    variances: torch.Tensor
    """``[pages, H, D]`` float32."""
    counts: torch.Tensor
    """``[pages, H]`` float32 queries seen."""

    def check(self, windows: int, heads: int, dim: int) -> None:
        """Refuses what kernels would read wrongly.

        Raises:
            ValueError: A tensor is of another shape, dtype or layout.
        """
        check_carried(self.block_table, self.request, windows, before=self.before)
        check("seen.means", self.means, ("pages", heads, dim), torch.float32)
        check("seen.variances", self.variances, tuple(self.means.shape), torch.float32)
        check("seen.counts", self.counts, tuple(self.means.shape[:2]), torch.float32)


@triton.jit
def _distance_kernel(  # type: ignore[no-untyped-def]
    p_queries, p_start, p_count, p_table, p_request, p_before, p_means, p_variances, p_seen, p_out,
    table_stride, stride_token, stride_head, longest, warm_up, TINY: tl.constexpr,
    SHARING: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """How far one head's queries of one window stand out; nothing before the warm-up."""
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    count = tl.minimum(tl.load(p_count + i_s), longest)
    if count <= 1:
        return
    p_row = p_out + (i_s * heads + i_h).to(tl.int64) * longest
    i_page = carried_page(p_table, table_stride, p_request, p_before, i_s)
    i_row = tl.maximum(i_page, 0) * heads  # page 0 in place of none
    if (i_page < 0) | (tl.load(p_seen + i_row + i_h) < warm_up):
        for t in range(0, count, BLOCK_T):
            o_t = t + tl.arange(0, BLOCK_T)
            tl.store(p_row + o_t, tl.zeros([BLOCK_T], dtype=tl.float32), mask=o_t < count)
        return
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for g in range(SHARING):
        o_g = (i_row + i_h // SHARING * SHARING + g) * D + o_d
        b_total += tl.load(p_variances + o_g, mask=m_d, other=0.0)
    floor = tl.sum(b_total, 0) / (SHARING * D) / 100 + TINY
    o_row = (i_row + i_h) * D + o_d
    b_weight = 1.0 / (tl.load(p_variances + o_row, mask=m_d, other=0.0) + floor)  # [BD]
    b_mean = tl.load(p_means + o_row, mask=m_d, other=0.0)
    start = tl.load(p_start + i_s).to(tl.int64)
    p_head = p_queries + start * stride_token + i_h.to(tl.int64) * stride_head
    store_distances(p_head, stride_token, count, b_mean, b_weight, p_row, D, BLOCK_T, BLOCK_D)


@triton.jit
def _weight_kernel(  # type: ignore[no-untyped-def]
    p_count, p_distances, p_weights, longest, sharpness,
    IS_PLAIN: tl.constexpr, SHARING: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Weights of one window's tokens by the heads that share them; they sum to 1."""
    i_s, i_k = tl.program_id(0), tl.program_id(1)
    i_row = (i_s * tl.num_programs(1) + i_k).to(tl.int64)
    count = tl.minimum(tl.load(p_count + i_s), longest)
    if count <= 1:
        return
    o_t = tl.arange(0, BLOCK_W)
    m_t = o_t < count
    b_bias = tl.zeros([BLOCK_W], dtype=tl.float32)
    for g in range(SHARING):
        b_bias += tl.load(p_distances + (i_row * SHARING + g) * longest + o_t, mask=m_t, other=0.0)
    b_bias = tl.where(b_bias < float("inf"), b_bias, 0.0)  # neither NaN nor infinite
    most = tl.max(b_bias, 0)
    b_share = b_bias / tl.where(most > 0, most, 1.0)
    if not IS_PLAIN:
        b_power = tl.exp2(sharpness * tl.log2(tl.where(b_share > 0, b_share, 1.0)))
        b_share = tl.where((b_share > 0) | (sharpness == 0), b_power, 0.0)
    b_share = tl.where(most > 0, b_share, 1.0)  # no token stands out
    b_share = tl.where(m_t, b_share, 0.0)
    tl.store(p_weights + i_row * longest + o_t, b_share / tl.sum(b_share, 0), mask=m_t)


@triton.jit
def _weighted_mean_kernel(  # type: ignore[no-untyped-def]
    p_queries, p_start, p_count, p_weights, p_vectors, stride_token, stride_head, longest,
    SHARING: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Weighted mean of one head's queries of one window; a single query is its own."""
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    count = tl.minimum(tl.load(p_count + i_s), longest)
    start = tl.load(p_start + i_s).to(tl.int64)
    p_head = p_queries + start * stride_token + i_h.to(tl.int64) * stride_head
    p_row = p_weights + (i_s * (heads // SHARING) + i_h // SHARING).to(tl.int64) * longest
    weighed = tl.where(count > 1, count, 0)
    o_d = tl.arange(0, BLOCK_D)
    b_sums = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for t in range(0, count, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_td = (o_t < count)[:, None] & (o_d < D)[None, :]
        p_block = p_head + o_t.to(tl.int64)[:, None] * stride_token + o_d[None, :]
        b_queries = tl.load(p_block, mask=m_td, other=0.0).to(tl.float32)  # [BT, BD]
        b_weights = tl.load(p_row + o_t, mask=o_t < weighed, other=1.0)[:, None]
        # A token that weighs nothing may be NaN.
        b_sums += tl.where(b_weights == 0, 0.0, b_weights * b_queries)
    p_out = p_vectors + (i_s * heads + i_h).to(tl.int64) * D + o_d
    tl.store(p_out, tl.sum(b_sums, 0), mask=o_d < tl.where(count > 0, D, 0))


def activation_means(
    windows: QueryWindows, seen: Seen, warm_up: int, sharpness: float,
    distances: torch.Tensor, weights: torch.Tensor, vectors: torch.Tensor,
) -> None:  # fmt: skip
    """Mean query of each window and query head under the window's activation weights.

    A window of one token gives that token's query; one of none leaves its row alone.

    Args:
        windows: The queries.
        seen: Statistics of the queries before each window.
        warm_up: Queries that a head must have seen; until then it weighs nothing, and where no
            head weighs anything all tokens weigh alike.
        sharpness: Power that weights are raised to, 0 to 100.
        distances: ``[S, H, W]`` float32 scratch, where no window has more than ``W`` tokens.
        weights: ``[S, shares, W]`` float32, written: with 1 share all heads weigh together, with
            Hk every KV head does for itself.
        vectors: ``[S, Hk, G, D]`` float32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or a number is out of
            range.
    """
    num, heads, kv_heads, dim = windows.check(vectors)
    _check(windows, seen, distances, weights, vectors)
    require(0 <= sharpness <= 100, f"Sharpness must be from 0 to 100, not {sharpness}.")
    longest, shares = weights.shape[2], weights.shape[1]
    require(shares in (1, kv_heads), f"Shares must be 1 or {kv_heads}, not {shares}.")
    if not num:
        return
    strides = windows.queries.stride()[:2]
    block_d = triton.next_power_of_2(dim)
    sharing = heads // shares
    blocks = {"SHARING": sharing, "D": dim, "BLOCK_T": BLOCK // block_d, "BLOCK_D": block_d}
    if longest > 1:
        _distance_kernel[(num, heads)](
            *windows, *seen, distances, seen.block_table.stride(0), *strides, longest,
            float(warm_up), TINY=TINY, **blocks,
        )  # fmt: skip
        _weight_kernel[(num, shares)](
            windows.num_tokens, distances, weights, longest, float(sharpness),
            IS_PLAIN=sharpness == 1, SHARING=sharing, BLOCK_W=triton.next_power_of_2(longest),
        )  # fmt: skip
    _weighted_mean_kernel[(num, heads)](*windows, weights, vectors, *strides, longest, **blocks)


def _check(
    windows: QueryWindows, seen: Seen, distances: torch.Tensor, weights: torch.Tensor,
    vectors: torch.Tensor,
) -> None:  # fmt: skip
    """See :func:`activation_means`."""
    _, heads, dim = windows.queries.shape
    num, kv_heads = vectors.shape[:2]
    check("vectors", vectors, (num, kv_heads, heads // kv_heads, dim), torch.float32)
    check("weights", weights, (num, "shares", "W"), torch.float32)
    check_longest(weights.shape[2])
    check("distances", distances, (num, heads, weights.shape[2]), torch.float32)
    seen.check(num, heads, dim)
    check_devices(vectors=vectors, weights=weights, distances=distances, **seen._asdict())


def activation_means_reference(
    windows: QueryWindows, seen: Seen, warm_up: int, sharpness: float,
    distances: torch.Tensor, weights: torch.Tensor, vectors: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`activation_means` in plain torch; float64 vectors are computed in float64."""
    shares, dtype = weights.shape[1], vectors.dtype
    for s, before in enumerate(seen.before.tolist()):
        page = physical_page(seen.block_table, int(seen.request[s]), before)
        query = windows.of(s).to(dtype).unflatten(1, (shares, -1))  # [c, shares, sharing, D]
        count = len(query)
        if not count:
            continue
        phi = torch.zeros(query.shape[:3], dtype=dtype, device=query.device)
        if page >= 0:
            mean, variance = (
                x[page].to(dtype).unflatten(0, (shares, -1)) for x in (seen.means, seen.variances)
            )
            floor = variance.mean((1, 2), keepdim=True) / 100 + TINY
            phi = ((query - mean) ** 2 / (variance + floor)).sum(-1)
            warm = seen.counts[page].unflatten(0, (shares, -1)) >= warm_up
            phi = phi.where(warm, 0)
        bias = phi.sum(2)  # [c, shares]
        bias = bias.where(bias.isfinite(), 0)
        most = bias.amax(0)
        weight = torch.where(most > 0, (bias / most) ** sharpness, torch.ones_like(bias))
        weight = (weight / weight.sum(0))[:, :, None, None]
        mean = torch.where(weight == 0, 0, weight * query).sum(0) if count > 1 else query[0]
        vectors[s] = mean.flatten(0, 1).view_as(vectors[s])


_BLOCKS = {"SHARING": 4, "D": 128, "BLOCK_T": BLOCK // 128, "BLOCK_D": 128}
COMPILED = (
    Variant(
        _distance_kernel,
        "*bf16 *i32 *i32 *i32 *i32 *i32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32 i32 fp32",
        _BLOCKS | {"TINY": TINY},
    ),
    Variant(
        _weight_kernel, "*i32 *fp32 *fp32 i32 fp32",
        {"IS_PLAIN": False, "SHARING": 32, "BLOCK_W": 256},
    ),
    Variant(_weighted_mean_kernel, "*bf16 *i32 *i32 *fp32 *fp32 i32 i32 i32", _BLOCKS),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
