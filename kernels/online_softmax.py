"""Attention to one block of keys, which makes a softmax over all of them without storing logits.

A running maximum, sum and output are kept in float32 and rescaled when the maximum grows
(Milakov and Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691). Helpers of
:mod:`kvplug.kernels.paged_attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvplug.kernels.merge_attention import LOG2E

UNIT = tl.constexpr(16)
"""Numbers that strides are multiples of, so that loads are of 16 bytes and can be in flight."""


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    p_cache, p_row, j, stop, stride_page, stride_token,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """``[BN, BD]`` keys or values of a row's tokens from ``j`` on; 0 from token ``stop`` on."""
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n = j + o_n < stop
    if PAGE >= BLOCK_N:  # all in one page, since j is a multiple of BLOCK_N
        b_page, o_token = tl.load(p_row + j // PAGE), j % PAGE + o_n
    elif MASKED:
        b_page = tl.load(p_row + (j + o_n) // PAGE, mask=m_n, other=0)
        o_token = (j + o_n) % PAGE
    else:
        b_page, o_token = tl.load(p_row + (j + o_n) // PAGE), (j + o_n) % PAGE
    p_page = p_cache + b_page.to(tl.int64) * (stride_page * UNIT)
    p_token = p_page + o_token * (stride_token * UNIT)
    p_tile = p_token[:, None] + o_d[None, :]
    if MASKED:
        b_tile = tl.load(p_tile, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
    elif BLOCK_D > D:
        b_tile = tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def attend_block(  # type: ignore[no-untyped-def]
    b_q, b_most, b_total, b_out, p_keys, p_values, p_row, j, stop, b_visible, scale,
    key_page, key_token, value_page, value_token,
    PAGE: tl.constexpr, D: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and output after BLOCK_N more keys; logits in powers of 2."""
    b_k = load_tile(p_keys, p_row, j, stop, key_page, key_token, PAGE, D, BLOCK_N, BLOCK_D, MASKED)
    b_logits = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)))  # [BM, BN]
    if CAP > 0:
        b_tanh = 2 * tl.sigmoid(b_logits * (2 * scale / CAP)) - 1
        b_logits = b_tanh * (CAP * LOG2E)
    else:
        b_logits *= scale * LOG2E
    if MASKED:
        o_n = j + tl.arange(0, BLOCK_N)
        m_mn = (o_n[None, :] < b_visible[:, None]) & (o_n < stop)[None, :]
        b_logits = tl.where(m_mn, b_logits, float("-inf"))
    b_more = tl.maximum(b_most, tl.max(b_logits, 1))  # [BM]
    b_base = tl.where(b_more == float("-inf"), 0.0, b_more) if MASKED else b_more
    b_p = tl.exp2(b_logits - b_base[:, None])  # [BM, BN]
    b_shrink = tl.exp2(b_most - b_base)
    b_total = b_total * b_shrink + tl.sum(b_p, 1)
    b_v = load_tile(
        p_values, p_row, j, stop, value_page, value_token, PAGE, D, BLOCK_N, BLOCK_D, MASKED
    )
    b_out = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_out * b_shrink[:, None])
    return b_more, b_total, b_out
