"""The channels in which a context's first keys differ most: what its channel codes are made of.

The twin on CPU is :meth:`kvplug.index.channels.ChannelsIndex.begin` (after Double Sparsity, Yang et
al. 2024, arXiv 2408.07092). Of every KV head, channels are ranked by the variance of the context's
first keys, each by its own and that of the one which rotary embeddings turn it into, ``d + D/2``.
Of the C best, mean and standard deviation are kept on the context's first page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import (
    FLOATS,
    check,
    check_devices,
    check_head_dim,
    require,
)
from kvplug.kernels.compile_check import Variant

BLOCK = 4096
"""Numbers of keys that a program loads at a time."""
CHANNELS = (32, 64)
"""Channels of a code of 64 and of 128 bits, C."""


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    p_keys, stride_token, count, o_d, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Mean and variance of channels ``o_d`` over one head's ``count`` keys: [BD] each."""
    b_sums = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for t in range(0, count, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_td = (o_t < count)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
        p_block = p_keys + o_t.to(tl.int64)[:, None] * stride_token + o_d[None, :]
        b_sums += tl.load(p_block, mask=m_td, other=0.0).to(tl.float32)  # [BT, BD]
    size = count.to(tl.float32)
    b_mean = tl.div_rn(tl.sum(b_sums, 0), size)
    b_spread = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for t in range(0, count, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_td = (o_t < count)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
        p_block = p_keys + o_t.to(tl.int64)[:, None] * stride_token + o_d[None, :]
        b_delta = tl.load(p_block, mask=m_td, other=0.0).to(tl.float32) - b_mean[None, :]
        b_spread += tl.where(m_td, b_delta * b_delta, 0.0)
    return b_mean, tl.div_rn(tl.sum(b_spread, 0), size)


@triton.jit
def _channel_choice_kernel(  # type: ignore[no-untyped-def]
    p_keys, p_places, p_chosen, p_scales, count, stride_context, stride_token, stride_head,
    C: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One KV head of one context."""
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    place = tl.load(p_places + i_m).to(tl.int64)
    if place < 0:
        return
    o_d = tl.arange(0, BLOCK_D)
    p_head = p_keys + i_m.to(tl.int64) * stride_context + i_h.to(tl.int64) * stride_head
    # Moments of the channel's partner are computed again: registers cannot be turned around.
    o_partner = (o_d + D // 2) % D
    _, b_partner = _moments(p_head, stride_token, count, o_partner, D, BLOCK_T, BLOCK_D)
    b_mean, b_variance = _moments(p_head, stride_token, count, o_d, D, BLOCK_T, BLOCK_D)
    b_rank = b_variance + b_partner  # [BD]; 0 or more, so its bits order as it does
    b_order = b_rank.to(tl.int32, bitcast=True)
    b_order = tl.where(b_rank == b_rank, b_order, 0x7FFFFFFF)  # NaN before infinity, as on CPU
    b_order = tl.where(o_d < D, b_order, -2)
    i_row = place * tl.num_programs(1) + i_h
    p_scale = p_scales + i_row * (2 * C)
    b_deviation = tl.sqrt_rn(b_variance)
    for c in range(C):
        best = tl.argmax(b_order, 0)
        m_best = o_d == best
        b_order = tl.where(m_best, -1, b_order)
        tl.store(p_chosen + i_row * C + c, best.to(tl.int16))
        p_one = p_scale + c + tl.zeros_like(o_d)  # the mask leaves one
        tl.store(p_one, b_mean, mask=m_best)
        tl.store(p_one + C, b_deviation, mask=m_best)


def channel_choice(
    keys: torch.Tensor, places: torch.Tensor, chosen: torch.Tensor, scales: torch.Tensor
) -> None:
    """Chooses the channels of contexts, for every KV head.

    Args:
        keys: ``[m, n, Hk, D]`` bfloat16, float16 or float32, the first ``n`` keys of each context;
            any strides but for the last dimension, which is contiguous.
        places: ``[m]`` int32 or int64, physical page at which each context begins; a negative one
            is padding.
        chosen: ``[pages, Hk, C]`` int16, written at the places: channels, most varied first.
        scales: ``[pages, Hk, 2, C]`` float32, written at the places: means, then standard
            deviations.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or there are no keys.
    """
    check("keys", keys, ("m", "n", "Hk", "D"), FLOATS, contiguous=False)
    contexts, tokens, heads, dim = keys.shape
    check_head_dim(dim)
    require(tokens > 0, "Channels are chosen by at least one key.")
    check("places", places, (contexts,), (torch.int32, torch.int64))
    check_channels(chosen, scales, heads)
    check_devices(keys=keys, places=places, chosen=chosen, scales=scales)
    block_d = triton.next_power_of_2(dim)
    if not contexts:
        return
    _channel_choice_kernel[(contexts, heads)](
        keys, places, chosen, scales, tokens, *keys.stride()[:3],
        C=chosen.shape[2], D=dim, BLOCK_T=BLOCK // block_d, BLOCK_D=block_d,
    )  # fmt: skip


def check_channels(chosen: torch.Tensor, scales: torch.Tensor, heads: int) -> None:
    """Refuses channels that kernels would read or write wrongly; see :func:`channel_choice`.

    Raises:
        ValueError: A tensor is of another shape, dtype or layout, or C is not supported.
    """
    check("chosen", chosen, ("pages", heads, "C"), torch.int16)
    pages, _, channels = chosen.shape
    require(channels in CHANNELS, f"Channels must be one of {CHANNELS}, not {channels}.")
    check("scales", scales, (pages, heads, 2, channels), torch.float32)


def channel_choice_reference(
    keys: torch.Tensor, places: torch.Tensor, chosen: torch.Tensor, scales: torch.Tensor
) -> None:
    """Twin of :func:`channel_choice` in plain torch."""
    known = places >= 0
    mine, place = keys[known].float(), places[known].long()  # [m, n, Hk, D]
    mean = mine.mean(1)
    variance = ((mine - mean[:, None]) ** 2).mean(1)  # [m, Hk, D]
    rank = variance + variance.roll(-(keys.shape[3] // 2), 2)
    best = rank.argsort(dim=2, descending=True, stable=True)[..., : chosen.shape[2]]
    chosen[place] = best.short()
    # Torch's square root of float32 is not always the nearest one; from float64 it is.
    deviation = variance.gather(2, best).double().sqrt().float()
    scales[place] = torch.stack([mean.gather(2, best), deviation], 2)


COMPILED = tuple(
    Variant(
        _channel_choice_kernel, f"*{dtype} *i64 *i16 *fp32 i32 i32 i32 i32",
        {
            "C": channels, "D": dim, "BLOCK_T": BLOCK // triton.next_power_of_2(dim),
            "BLOCK_D": triton.next_power_of_2(dim),
        },
    )
    for dtype, dim, channels in [("bf16", 128, 64), ("fp32", 80, 32), ("fp16", 256, 64)]
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
