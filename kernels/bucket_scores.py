"""Scores of pages by hash buckets: in how many rounds the best token meets the best probe.

The twin on CPU is :class:`kvplug.index.buckets.BucketIndex` (after HAX, arXiv 2507.00449). A word
holds ``rounds`` numbers of ``bits`` sign bits each; two words meet in a round whose bits are all
equal. Scores are whole numbers, so they are exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, check_page, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.far_pages import FarPages, far_limit, far_pages
from kvplug.kernels.hash_scores import BLOCK_WORDS
from kvplug.kernels.popcount import popcount64

BITS = 64
"""Of a word."""


@triton.jit
def _misses(b_differ, low, top):  # type: ignore[no-untyped-def]
    """Rounds whose bits are not all zero in int64 words.

    ``top`` is the highest bit of every round and ``low`` the others. Adding ``low`` carries into a
    round's highest bit if any lower one is set, and never into the next round.
    """
    b_any = (((b_differ & low) + low) | b_differ) & top
    return popcount64(b_any.to(tl.uint32), (b_any >> 32).to(tl.uint32))


@triton.jit
def _bucket_scores_kernel(  # type: ignore[no-untyped-def]
    p_words, p_probes, p_counts, p_table, p_request, p_begin, p_end, p_scores,
    table_stride, num_probes, num_pages, rounds, p_masks,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N pages of one head and window, each word loaded once."""
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = (i_s * tl.num_programs(1) + i_h).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_out = p_scores + i_row * num_pages + o_n
    limit = far_limit(p_counts, p_begin, p_end, i_s)
    if i_n * BLOCK_N >= limit:
        tl.store(p_out, float("-inf"), mask=o_n < num_pages)
        return
    m_n = o_n < limit
    b_pages = far_pages(p_table, p_request, p_begin, table_stride, i_s, o_n, m_n)  # [BN]
    o_w = (b_pages * tl.num_programs(1) + i_h)[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
    b_words = tl.load(p_words + o_w, mask=m_n[:, None], other=0)  # [BN, P]
    low, top = tl.load(p_masks), tl.load(p_masks + 1)
    b_fewest = tl.full([BLOCK_N], 64, tl.int32)
    for i_r in range(tl.load(p_counts + i_s)):
        probe = tl.load(p_probes + i_row * num_probes + i_r)
        b_fewest = tl.minimum(b_fewest, tl.min(_misses(b_words ^ probe, low, top), 1))
    b_scores = tl.where(m_n, (rounds - b_fewest).to(tl.float32), float("-inf"))
    tl.store(p_out, b_scores, mask=o_n < num_pages)


def bucket_masks(bits: int, rounds: int, device: torch.device | str) -> torch.Tensor:
    """``[2]`` int64: the lower bits of every round, and the highest.

    Args:
        bits: Of a round.
        rounds: Of a word; ``bits * rounds`` is at most 64.
        device: Where.
    """
    require(
        bits >= 1 and rounds >= 1 and bits * rounds <= BITS,
        f"Buckets need bits and rounds of at least 1 and {BITS} together, not {bits}, {rounds}.",
    )
    top = sum(1 << (number * bits + bits - 1) for number in range(rounds))
    used = (1 << (bits * rounds)) - 1
    signed = [mask - (mask >> 63 << 64) for mask in (used & ~top, top)]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def bucket_scores(
    words: torch.Tensor, probes: torch.Tensor, counts: torch.Tensor, far: FarPages, rounds: int,
    masks: torch.Tensor, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Scores the far pages of every window; the rest of a row becomes minus infinity.

    Args:
        words: ``[pages, Hk, P]`` int64 of the keys.
        probes: ``[S, Hk, R]`` int64 of the probes.
        counts: ``[S]`` int32 probes of each window, at most R; with 0 its row is minus infinity.
        far: The far pages, at most N a window.
        rounds: Of a word.
        masks: ``[2]`` int64 of :func:`bucket_masks`.
        scores: ``[S, Hk, N]`` float32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    heads, page = words.shape[1:]
    far.check(counts, scores, heads)
    windows, _, pages = scores.shape
    check("words", words, ("pages", heads, "P"), torch.int64)
    check_page(page)
    check("probes", probes, (windows, heads, "R"), torch.int64)
    check("masks", masks, (2,), torch.int64)
    check_devices(words=words, probes=probes, masks=masks, scores=scores)
    if not scores.numel():
        return
    block = BLOCK_WORDS // page
    _bucket_scores_kernel[(triton.cdiv(pages, block), heads, windows)](
        words, probes, counts, *far, scores, far.block_table.stride(0), probes.shape[2], pages,
        rounds, masks, PAGE=page, BLOCK_N=block,
    )  # fmt: skip


def bucket_scores_reference(
    words: torch.Tensor, probes: torch.Tensor, counts: torch.Tensor, far: FarPages, rounds: int,
    masks: torch.Tensor, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`bucket_scores` in plain torch."""
    top = int(masks[1])
    bits = (top & -top).bit_length()  # its lowest bit is the first round's highest
    shifts = torch.arange(rounds * bits, device=words.device)
    scores.fill_(-torch.inf)
    for s, count in enumerate(counts.tolist()):
        pages = far.pages(s)
        if count and len(pages):
            mine = words[pages].transpose(0, 1)[:, None]  # [Hk, 1, N, P]
            differ = mine ^ probes[s, :, :count, None, None]  # [Hk, R, N, P]
            rounds_met = ((differ[..., None] >> shifts & 1) == 0).unflatten(-1, (rounds, bits))
            met = rounds_met.all(-1).sum(-1)  # [Hk, R, N, P]
            scores[s, :, : len(pages)] = met.amax((1, 3)).float()


COMPILED = tuple(
    Variant(
        _bucket_scores_kernel,
        "*i64 *i64 *i32 *i32 *i32 *i32 *i32 *fp32 i32 i32 i32 i32 *i64",
        {"PAGE": page, "BLOCK_N": BLOCK_WORDS // page},
    )
    for page in (32, 128)
)
"""For :mod:`kvplug.kernels.compile_check`."""
