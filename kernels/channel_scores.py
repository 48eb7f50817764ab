"""Scores of pages by channel codes: the logarithm of a page's shares of the probes' attention.

The twins on CPU are :meth:`kvplug.index.channels.ChannelsIndex.score` and
:func:`kvplug.index.shares.sum_shares`. A page's logit for a probe is that of its best token,
``unit * 2 * (sum of the weights of bits that agree)``, whole but for the unit. A softmax over the
window's far pages turns a probe's logits into shares, and a score is the logarithm of the sum of
shares over probes. A page whose logit is no number has no share in others' sums and no score.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.channel_codes import FIELD, check_codes
from kvplug.kernels.channel_probes import check_asked
from kvplug.kernels.checks import check, check_devices
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.far_pages import FarPages, far_limit, far_pages
from kvplug.kernels.popcount import popcount64

BLOCK_WORDS = 1024
"""Words that a program keeps in registers while every probe passes over them."""
BLOCK_PAGES = 1024
"""Pages that shares are summed over at a time."""
LEAST = tl.constexpr(-126.0)
"""Binary logarithm of the least share: smaller ones are no normal floats."""
LOG_2 = tl.constexpr(math.log(2))


class ChannelScratch(NamedTuple):
    """What is between codes and scores."""

    logits: torch.Tensor
    """``[S, Hk, R, N]`` float32, in units of ln 2."""
    totals: torch.Tensor
    """``[S, Hk, R]`` float32: binary logarithms of sums over pages of ``2^logit``."""


@triton.jit
def _agreement(b_low, b_high, p_asked):  # type: ignore[no-untyped-def]
    """Weights of the bits in which words, given as two ``uint32`` blocks, are as asked."""
    sign = tl.load(p_asked)
    # What differs from the opposite is equal: to turn unsigned words over, Triton 3.6's interpreter
    # makes a -1 that numpy refuses.
    opposite = ~sign
    b_low ^= opposite.to(tl.uint32)
    b_high ^= (opposite >> 32).to(tl.uint32)
    b_sum = tl.zeros(b_low.shape, dtype=tl.int32)
    for i in tl.static_range(3):
        plane = tl.load(p_asked + 1 + i)
        b_bits = popcount64(b_low & plane.to(tl.uint32), b_high & (plane >> 32).to(tl.uint32))
        b_sum += b_bits << i
    return b_sum


@triton.jit
def _channel_logits_kernel(  # type: ignore[no-untyped-def]
    p_codes, p_asked, p_units, p_counts, p_table, p_request, p_begin, p_end, p_logits,
    table_stride, num_probes, num_pages,
    PAGE: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits of a window's probes for BLOCK_N pages of one head, each code loaded once."""
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    limit = far_limit(p_counts, p_begin, p_end, i_s)
    if i_n * BLOCK_N >= limit:
        return
    i_row = (i_s * tl.num_programs(1) + i_h).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < limit
    b_pages = far_pages(p_table, p_request, p_begin, table_stride, i_s, o_n, m_n)  # [BN]
    o_w = (b_pages * tl.num_programs(1) + i_h)[:, None] * (WORDS * PAGE)
    p_word = p_codes + o_w + tl.arange(0, PAGE)[None, :]
    b_first = tl.load(p_word, mask=m_n[:, None], other=0)  # [BN, P]
    b_low, b_high = b_first.to(tl.uint32), (b_first >> 32).to(tl.uint32)
    if WORDS == 2:
        b_second = tl.load(p_word + PAGE, mask=m_n[:, None], other=0)
        b_low2, b_high2 = b_second.to(tl.uint32), (b_second >> 32).to(tl.uint32)
    for i_r in range(tl.load(p_counts + i_s)):
        i_probe = i_row * num_probes + i_r
        p_mine = p_asked + i_probe * (WORDS * 4)
        b_sum = _agreement(b_low, b_high, p_mine)  # [BN, P]
        if WORDS == 2:
            b_sum += _agreement(b_low2, b_high2, p_mine + 4)
        b_logits = tl.load(p_units + i_probe) * (2 * tl.max(b_sum, 1)).to(tl.float32)
        tl.store(p_logits + i_probe * num_pages + o_n, b_logits, mask=m_n)


@triton.jit
def _channel_totals_kernel(  # type: ignore[no-untyped-def]
    p_counts, p_begin, p_end, p_logits, p_totals, num_pages, BLOCK_N: tl.constexpr
):
    """What one probe's shares are relative to."""
    i_r, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_r >= tl.load(p_counts + i_s):
        return
    limit = far_limit(p_counts, p_begin, p_end, i_s)
    i_probe = (i_s * tl.num_programs(1) + i_h).to(tl.int64) * tl.num_programs(0) + i_r
    p_mine = p_logits + i_probe * num_pages
    b_most = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for n in range(0, limit, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_logits = tl.load(p_mine + o_n, mask=o_n < limit, other=float("-inf"))
        m_number = b_logits - b_logits == 0
        b_most = tl.maximum(b_most, tl.where(m_number, b_logits, float("-inf")))
    most = tl.max(b_most, 0)
    b_total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for n in range(0, limit, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_logits = tl.load(p_mine + o_n, mask=o_n < limit, other=float("-inf"))
        m_number = b_logits - b_logits == 0
        b_share = tl.exp2(tl.maximum(tl.where(m_number, b_logits - most, LEAST), LEAST))
        b_total += tl.where(m_number, b_share, 0.0)
    total = tl.maximum(tl.sum(b_total, 0), 1.0)
    tl.store(p_totals + i_probe, most + tl.log2(total))


@triton.jit
def _channel_shares_kernel(  # type: ignore[no-untyped-def]
    p_counts, p_begin, p_end, p_logits, p_totals, p_scores, num_probes, num_pages,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N pages of one head and window."""
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = (i_s * tl.num_programs(1) + i_h).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_out = p_scores + i_row * num_pages + o_n
    limit = far_limit(p_counts, p_begin, p_end, i_s)
    m_n = o_n < limit
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    m_number = m_n
    if i_n * BLOCK_N < limit:
        for i_r in range(tl.load(p_counts + i_s)):
            i_probe = i_row * num_probes + i_r
            b_logits = tl.load(p_logits + i_probe * num_pages + o_n, mask=m_n, other=0.0)
            m_number &= b_logits - b_logits == 0
            b_share = tl.minimum(b_logits - tl.load(p_totals + i_probe), 0.0)
            b_sum += tl.exp2(tl.maximum(b_share, LEAST))
    b_scores = tl.where(m_number, LOG_2 * tl.log2(b_sum), float("nan"))
    tl.store(p_out, tl.where(m_n, b_scores, float("-inf")), mask=o_n < num_pages)


def channel_scores(
    codes: torch.Tensor, asked: torch.Tensor, units: torch.Tensor, counts: torch.Tensor,
    far: FarPages, scratch: ChannelScratch, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Scores the far pages of every window; the rest of a row becomes minus infinity.

    Args:
        codes: ``[pages, Hk, W, P]`` int64 of the keys, in W words each; see
            :func:`kvplug.kernels.channel_codes.channel_codes`.
        asked: ``[S, Hk, R, W, 4]`` int64; see :func:`kvplug.kernels.channel_probes.channel_probes`.
        units: ``[S, Hk, R]`` float32.
        counts: ``[S]`` int32 probes of each window, at most R; with 0 its row is minus infinity.
        far: The far pages, at most N a window.
        scratch: Overwritten.
        scores: ``[S, Hk, N]`` float32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    far.check(counts, scores, codes.shape[1])
    windows, heads, pages = scores.shape
    words, page = codes.shape[2:]
    check_codes(codes, heads, words * FIELD)
    probes = units.shape[-1]
    check_asked(asked, units, (windows, heads, probes), words * FIELD)
    check("scratch.logits", scratch.logits, (windows, heads, probes, pages), torch.float32)
    check("scratch.totals", scratch.totals, (windows, heads, probes), torch.float32)
    check_devices(codes=codes, asked=asked, units=units, scores=scores, **scratch._asdict())
    if not scores.numel():
        return
    block = max(BLOCK_WORDS // (page * words), 1)
    _channel_logits_kernel[(triton.cdiv(pages, block), heads, windows)](
        codes, asked, units, counts, *far, scratch.logits, far.block_table.stride(0), probes,
        pages, PAGE=page, WORDS=words, BLOCK_N=block,
    )  # fmt: skip
    ends = counts, far.begin, far.end
    _channel_totals_kernel[(probes, heads, windows)](
        *ends, *scratch, pages, BLOCK_N=BLOCK_PAGES
    )  # fmt: skip
    _channel_shares_kernel[(triton.cdiv(pages, BLOCK_PAGES), heads, windows)](
        *ends, *scratch, scores, probes, pages, BLOCK_N=BLOCK_PAGES
    )


def channel_scores_reference(
    codes: torch.Tensor, asked: torch.Tensor, units: torch.Tensor, counts: torch.Tensor,
    far: FarPages, scratch: ChannelScratch, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`channel_scores` in plain torch; float64 scores are computed in float64."""
    scores.fill_(-torch.inf)
    for s, count in enumerate(counts.tolist()):
        pages = far.pages(s)
        if not count or not len(pages):
            continue
        mine = codes[pages].permute(1, 2, 0, 3)[:, None]  # [Hk, 1, W, N, P]
        sign, *planes = asked[s, :, :count, :, :, None, None].unbind(3)  # [Hk, R, W, 1, 1]
        agree = ~(mine ^ sign)
        weight = torch.zeros_like(agree)  # [Hk, R, W, N, P]
        for i, plane in enumerate(planes):
            weight += _popcount(agree & plane) << i
        most = weight.sum(2).amax(-1)  # [Hk, R, N]
        logits = units[s, :, :count, None].to(scores.dtype) * (2 * most).to(scores.dtype)
        scratch.logits[s, :, :count, : len(pages)] = logits
        scores[s, :, : len(pages)] = _log_shares(logits)


def _popcount(words: torch.Tensor) -> torch.Tensor:
    """Set bits of each word, looked up byte by byte."""
    bits = torch.arange(8, device=words.device)
    ones = (torch.arange(256, device=words.device)[:, None] >> bits & 1).sum(1)
    return ones[words[..., None].view(torch.uint8).int()].sum(-1)


def _log_shares(logits: torch.Tensor) -> torch.Tensor:
    """``[Hk, N]`` scores of ``[Hk, R, N]`` logits in units of ln 2."""
    is_number = logits.isfinite()
    known = logits.where(is_number, -torch.inf)
    total = torch.logsumexp(known * LOG_2.value, -1, keepdim=True) / LOG_2.value
    shares = (logits - total).clamp(LEAST.value, 0).exp2()
    return LOG_2.value * shares.where(is_number, torch.nan).sum(1).log2()


_ENDS = "*i32 *i32 *i32 *fp32 *fp32"
COMPILED = (
    *(
        Variant(
            _channel_logits_kernel,
            "*i64 *i64 *fp32 *i32 *i32 *i32 *i32 *i32 *fp32 i32 i32 i32",
            {"PAGE": page, "WORDS": words, "BLOCK_N": BLOCK_WORDS // (page * words)},
        )
        for page, words in ((32, 2), (128, 2), (16, 1))
    ),
    Variant(_channel_totals_kernel, f"{_ENDS} i32", {"BLOCK_N": BLOCK_PAGES}),
    Variant(_channel_shares_kernel, f"{_ENDS} *fp32 i32 i32", {"BLOCK_N": BLOCK_PAGES}),
)
"""For :mod:`kvplug.kernels.compile_check`."""
