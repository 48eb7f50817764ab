"""A window's last and most activated queries as its probes.

The twin on CPU is :class:`kvplug.probe.last_activated.LastAndActivatedProbe`. Activation is
ActQKV's activation bias (Xiao et al. 2025, arXiv 2502.13542): the squared deviation of a query
from the window's mean in units of its variance, ``(q - mu)^2 / (var + mean(var) / 100)``, summed
over dimensions and over the query heads of a KV head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.distance import (
    BLOCK,
    QueryWindows,
    check_longest,
    store_distances,
    window_moments,
)


@triton.jit
def _window_bias_kernel(  # type: ignore[no-untyped-def]
    p_queries, p_start, p_count, p_bias, stride_token, stride_head, longest,
    WANTED: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Activation bias of one head's queries of one window, unless all of them are probes."""
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    count = tl.minimum(tl.load(p_count + i_s), longest)
    if count <= WANTED:
        return
    start = tl.load(p_start + i_s).to(tl.int64)
    p_head = p_queries + start * stride_token + i_h.to(tl.int64) * stride_head
    b_mean, b_squares = window_moments(p_head, stride_token, count, D, BLOCK_T, BLOCK_D)
    floor = tl.sum(b_squares, 0) / D * 0.01 + 1e-30  # where no query differs from another
    b_weight = count / (b_squares + floor)
    p_out = p_bias + (i_s * tl.num_programs(1) + i_h).to(tl.int64) * longest
    store_distances(p_head, stride_token, count, b_mean, b_weight, p_out, D, BLOCK_T, BLOCK_D)


@triton.jit
def _copy_heads(  # type: ignore[no-untyped-def]
    p_token, p_vectors, stride_head,
    G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copies a KV head's ``G`` queries of one token."""
    o_g, o_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    m_gd = (o_g < G)[:, None] & (o_d < D)[None, :]
    p_block = p_token + o_g.to(tl.int64)[:, None] * stride_head + o_d[None, :]
    b_queries = tl.load(p_block, mask=m_gd)  # [G, BD]
    tl.store(p_vectors + o_g[:, None] * D + o_d[None, :], b_queries, mask=m_gd)


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    p_queries, p_start, p_count, p_bias, p_vectors, p_counts, stride_token, stride_head, longest,
    LAST: tl.constexpr, WANTED: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copies the chosen tokens' queries of one window and KV head."""
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    i_row = (i_s * tl.num_programs(1) + i_h).to(tl.int64)
    count = tl.minimum(tl.load(p_count + i_s), longest)
    tl.store(p_counts + i_s, tl.minimum(count, WANTED) * G, mask=i_h == 0)
    start = tl.load(p_start + i_s).to(tl.int64)
    p_head = p_queries + start * stride_token + i_h.to(tl.int64) * G * stride_head
    p_out = p_vectors + i_row * (WANTED * G * D)
    taken = tl.where(count > WANTED, LAST, count)
    for i in range(taken):
        p_token = p_head + (count - taken + i).to(tl.int64) * stride_token
        _copy_heads(p_token, p_out + i * (G * D), stride_head, G, D, BLOCK_G, BLOCK_D)
    if p_bias is not None:  # noqa: SIM102 - decided when compiled, the other when run
        if count > WANTED:
            o_t = tl.arange(0, BLOCK_W)
            m_t = o_t < count - LAST
            b_bias = tl.zeros([BLOCK_W], dtype=tl.float32)
            for g in range(G):
                b_bias += tl.load(p_bias + (i_row * G + g) * longest + o_t, mask=m_t, other=0.0)
            # NaN stands out most, as it does for an argmax on CPU.
            b_bias = tl.where(b_bias == b_bias, b_bias, float("inf"))
            b_bias = tl.where(m_t, b_bias, float("-inf"))
            for i in range(LAST, WANTED):
                best = tl.argmax(b_bias, 0)
                b_bias = tl.where(o_t == best, -1.0, b_bias)
                p_token = p_head + best.to(tl.int64) * stride_token
                _copy_heads(p_token, p_out + i * (G * D), stride_head, G, D, BLOCK_G, BLOCK_D)


def last_activated(
    windows: QueryWindows, last: int, active: int, bias: torch.Tensor | None,
    vectors: torch.Tensor, counts: torch.Tensor,
) -> None:  # fmt: skip
    """Copies the queries of each window's last and most activated tokens.

    A window of up to ``last + active`` tokens gives all of them, in order; a longer one its last
    tokens, in order, then the most activated of the others, of equal ones the first.

    Args:
        windows: The queries.
        last: Tokens taken from the end, at least 1.
        active: Tokens taken from the rest.
        bias: ``[S, H, W]`` float32 scratch, where no window has more than ``W`` tokens. None: no
            window has more tokens than ``vectors`` hold, as at decode.
        vectors: ``[S, Hk, R, D]`` of the queries' dtype or float32, written up to the counts;
            with ``bias``, ``R = G * (last + active)``.
        counts: ``[S]`` int32, written: vectors of each window.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or a number is out of
            range.
    """
    num, heads, kv_heads, dim = windows.check(vectors)
    group = heads // kv_heads
    wanted = vectors.shape[2] // group
    require(
        last >= 1 and active >= 0,
        f"last_activated needs last >= 1 and active >= 0, not {last}, {active}.",
    )
    tokens = last + active if bias is not None else wanted
    check("vectors", vectors, (num, kv_heads, group * tokens, dim), vectors.dtype)
    check("counts", counts, (num,), torch.int32)
    if bias is not None:
        check("bias", bias, (num, heads, "W"), torch.float32)
    check_devices(vectors=vectors, counts=counts, bias=bias)
    longest = wanted if bias is None else bias.shape[2]
    check_longest(longest)
    strides = windows.queries.stride()[:2]
    block_d = triton.next_power_of_2(dim)
    if not num:
        return
    if longest > wanted:
        _window_bias_kernel[(num, heads)](
            *windows, bias, *strides, longest,
            WANTED=wanted, D=dim, BLOCK_T=BLOCK // block_d, BLOCK_D=block_d,
        )  # fmt: skip
    _choose_kernel[(num, kv_heads)](
        *windows, bias if longest > wanted else None, vectors, counts, *strides, longest,
        LAST=last, WANTED=wanted, G=group, D=dim, BLOCK_W=triton.next_power_of_2(longest),
        BLOCK_G=triton.next_power_of_2(group), BLOCK_D=block_d,
    )  # fmt: skip


def last_activated_reference(
    windows: QueryWindows, last: int, active: int, bias: torch.Tensor | None,
    vectors: torch.Tensor, counts: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`last_activated` in plain torch, which needs no scratch."""
    kv_heads, dim = vectors.shape[1], vectors.shape[3]
    for s in range(len(counts)):
        mine = windows.of(s).unflatten(1, (kv_heads, -1))  # [c, Hk, G, D]
        count, group = len(mine), mine.shape[2]
        wanted = min(count, vectors.shape[2] // group)
        counts[s] = wanted * group
        for head in range(kv_heads):
            tokens = list(range(count))
            if count > wanted:
                found = activation_bias(mine[:, head])[: count - last]
                order = found.sort(descending=True, stable=True).indices
                tokens = tokens[-last:] + order[:active].tolist()
            chosen = mine[tokens, head].reshape(-1, dim)  # [R_s, D]
            vectors[s, head, : len(chosen)] = chosen.to(vectors.dtype)


def activation_bias(queries: torch.Tensor) -> torch.Tensor:
    """``[c]`` bias of ``[c, G, D]`` queries in plain torch; float64 queries are kept so."""
    queries = queries.double() if queries.dtype == torch.float64 else queries.float()
    spread = (queries - queries.mean(0)) ** 2
    variance = spread.mean(0)
    floor = variance.mean(-1, keepdim=True) / 100
    return (spread / (variance + floor).clamp(min=1e-30)).sum((1, 2))


_SHAPE = {"WANTED": 8, "D": 128, "BLOCK_D": 128}
_CHOICE = _SHAPE | {"LAST": 4, "G": 4, "BLOCK_G": 4, "BLOCK_W": 256}
COMPILED = (
    Variant(
        _window_bias_kernel, "*bf16 *i32 *i32 *fp32 i32 i32 i32", _SHAPE | {"BLOCK_T": BLOCK // 128}
    ),
    Variant(_choose_kernel, "*bf16 *i32 *i32 *fp32 *bf16 *i32 i32 i32 i32", _CHOICE),
    Variant(
        _choose_kernel, "*fp32 *i32 *i32 *fp32 *i32 i32 i32 i32",
        _CHOICE | {"p_bias": None, "D": 80},
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
