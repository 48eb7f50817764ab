"""Channel codes: two bits of each chosen channel of a key, written where the key is.

The twin on CPU is :meth:`kvplug.index.channels.ChannelsIndex.seal`. Bit ``c`` of a token's code is
the sign of its deviation from the mean in channel ``c``, and bit ``C + c`` whether sign and
extremity agree: whether the deviation is positive and more than a standard deviation, or neither.
Sign and extreme bits have a word each if C is 64, and share one if it is 32. Only comparisons
decide, so kernel and twins agree to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.channel_choice import check_channels
from kvplug.kernels.checks import FLOATS, check, check_devices, check_head_dim, check_page
from kvplug.kernels.compile_check import Variant

BLOCK_T = 32
"""Tokens of a program. Not measured: no GPU was at hand."""
FIELD = 32
"""Bits of a half word, where both kinds of bits share a word."""


@triton.jit(do_not_specialize=["tokens"])
def _channel_codes_kernel(  # type: ignore[no-untyped-def]
    p_keys, p_slots, p_firsts, p_chosen, p_scales, p_codes, tokens, stride_token, stride_head,
    PAGE: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Codes of BLOCK_T tokens of one KV head."""
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    o_t, o_c = i_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, C)
    b_slot = tl.load(p_slots + o_t, mask=o_t < tokens, other=-1)  # [BT]
    b_first = tl.load(p_firsts + o_t, mask=o_t < tokens, other=-1).to(tl.int64)
    m_t = (b_slot >= 0) & (b_first >= 0)
    b_row = tl.where(m_t, b_first, 0) * tl.num_programs(1) + i_h
    m_tc = m_t[:, None] & (o_c >= 0)[None, :]
    b_channel = tl.load(p_chosen + b_row[:, None] * C + o_c[None, :], mask=m_tc, other=0)  # [BT, C]
    p_scale = p_scales + b_row[:, None] * (2 * C) + o_c[None, :]
    b_mean = tl.load(p_scale, mask=m_tc, other=0.0)
    b_deviation = tl.load(p_scale + C, mask=m_tc, other=0.0)
    p_token = p_keys + o_t.to(tl.int64) * stride_token + i_h.to(tl.int64) * stride_head
    b_keys = tl.load(p_token[:, None] + b_channel.to(tl.int32), mask=m_tc, other=0.0)
    b_delta = b_keys.to(tl.float32) - b_mean
    m_sign = b_delta > 0
    m_extreme = (tl.abs(b_delta) > b_deviation) == m_sign
    o_bit = o_c.to(tl.int64)[None, :]
    b_low = tl.sum(
        m_sign.to(tl.int64) << o_bit, 1
    )  # [BT]; bits are apart: their sum is their union
    b_high = tl.sum(m_extreme.to(tl.int64) << o_bit, 1)
    i_page = b_slot // PAGE * tl.num_programs(1) + i_h
    if C == 64:
        p_code = p_codes + i_page * (2 * PAGE) + b_slot % PAGE
        tl.store(p_code, b_low, mask=m_t)
        tl.store(p_code + PAGE, b_high, mask=m_t)
    else:
        tl.store(p_codes + i_page * PAGE + b_slot % PAGE, b_low | (b_high << C), mask=m_t)


def channel_codes(
    keys: torch.Tensor, slots: torch.Tensor, firsts: torch.Tensor,
    chosen: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor,
) -> None:  # fmt: skip
    """Writes codes of new keys into the slots that they are written to.

    Args:
        keys: ``[T, Hk, D]`` bfloat16, float16 or float32; tokens and heads may be strided.
        slots: ``[T]`` int64, ``page * P + offset``; a negative one is padding.
        firsts: ``[T]`` int32, physical page at which the token's context begins; a negative one
            is a context without channels yet, whose token is left out.
        chosen: ``[pages, Hk, C]`` int16; see :func:`kvplug.kernels.channel_choice.channel_choice`.
        scales: ``[pages, Hk, 2, C]`` float32.
        codes: ``[pages, Hk, C / 32, P]`` int64, written at the slots.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    check("keys", keys, ("T", "Hk", "D"), FLOATS, contiguous=False)
    tokens, heads, dim = keys.shape
    check_head_dim(dim)
    check("slots", slots, (tokens,), torch.int64)
    check("firsts", firsts, (tokens,), torch.int32)
    check_channels(chosen, scales, heads)
    channels = chosen.shape[2]
    check_codes(codes, heads, channels)
    check_devices(keys=keys, slots=slots, firsts=firsts, chosen=chosen, scales=scales, codes=codes)
    if not tokens:
        return
    _channel_codes_kernel[(triton.cdiv(tokens, BLOCK_T), heads)](
        keys, slots, firsts, chosen, scales, codes, tokens, *keys.stride()[:2],
        PAGE=codes.shape[3], C=channels, BLOCK_T=BLOCK_T,
    )  # fmt: skip


def check_codes(codes: torch.Tensor, heads: int, channels: int) -> None:
    """Refuses codes that kernels would read or write wrongly; see :func:`channel_codes`.

    Raises:
        ValueError: They are of another shape, dtype or layout, or the page size is not supported.
    """
    check("codes", codes, ("pages", heads, channels // FIELD, "P"), torch.int64)
    check_page(codes.shape[3])


def channel_codes_reference(
    keys: torch.Tensor, slots: torch.Tensor, firsts: torch.Tensor,
    chosen: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`channel_codes` in plain torch."""
    kept = (slots >= 0) & (firsts >= 0)
    first, page = firsts[kept].long(), codes.shape[3]
    mean, deviation = scales[first].unbind(2)  # [T, Hk, C] each
    delta = keys[kept].float().gather(2, chosen[first].long()) - mean
    sign = delta > 0
    extreme = (delta.abs() > deviation) == sign
    bits = torch.arange(chosen.shape[2], device=keys.device)
    low, high = ((kind.long() << bits).sum(-1) for kind in (sign, extreme))  # [T, Hk]
    where = slots[kept] // page, slice(None), slice(None), slots[kept] % page
    words = (low, high) if codes.shape[2] == 2 else (low | high << FIELD,)
    codes[where] = torch.stack(words, 2)


COMPILED = tuple(
    Variant(
        _channel_codes_kernel,
        f"*{dtype} *i64 *i32 *i16 *fp32 *i64 i32 i32 i32",
        {"PAGE": page, "C": channels, "BLOCK_T": BLOCK_T},
    )
    for dtype, page, channels in [("bf16", 32, 64), ("fp32", 128, 32)]
)
"""For :mod:`kvplug.kernels.compile_check`."""
