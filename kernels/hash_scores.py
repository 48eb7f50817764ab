"""Scores of pages by sign hashes: how well the best token of a page matches the best probe.

The twin on CPU is :class:`kvplug.index.simhash.SimHashIndex`. A window of one token scores a page
by ``64 - least Hamming distance`` of any of its probes to any token of the page. A window of
several tokens scores it by ``max over probes of (mean distance over the far pages) - distance``,
where a probe's distance to a page is that to its nearest token: a probe that matches every page
says nothing. Both are exact: distances are whole numbers, and so are their sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, check_page, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.far_pages import FarPages, far_limit, far_pages
from kvplug.kernels.popcount import popcount64

BLOCK_WORDS = 1024
"""Words that a program keeps in registers while every probe passes over them."""
BLOCK_EXCESS = 512
"""Pages of a program of the second launch."""
MOST_PAGES = 2**18
"""Pages whose distances, 64 at most, add up to a whole number that float32 knows."""


class Several(NamedTuple):
    """What windows of several tokens need; a step that only decodes has none."""

    flags: torch.Tensor
    """``[S]`` bool, whether a window has several tokens."""
    nearest: torch.Tensor
    """``[S, Hk, R, N]`` uint8 scratch: distance of each probe to each page."""
    sums: torch.Tensor
    """``[S, Hk, R]`` int32 scratch: its sum over pages."""


@triton.jit
def _nearest_kernel(  # type: ignore[no-untyped-def]
    p_words, p_probes, p_counts, p_table, p_request, p_begin, p_end, p_scores, p_several,
    p_nearest, p_sums, table_stride, num_probes, num_pages,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Distances of a window's probes to BLOCK_N pages of one head, each word loaded once."""
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = (i_s * tl.num_programs(1) + i_h).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_out = p_scores + i_row * num_pages + o_n
    limit = far_limit(p_counts, p_begin, p_end, i_s)
    if i_n * BLOCK_N >= limit:
        tl.store(p_out, float("-inf"), mask=o_n < num_pages)
        return
    m_n = o_n < limit
    if p_several is not None:
        is_several = tl.load(p_several + i_s)
    b_pages = far_pages(p_table, p_request, p_begin, table_stride, i_s, o_n, m_n)  # [BN]
    o_w = (b_pages * tl.num_programs(1) + i_h)[:, None] * PAGE + tl.arange(0, PAGE)[None, :]
    b_words = tl.load(p_words + o_w, mask=m_n[:, None], other=0)  # [BN, P]
    b_low, b_high = b_words.to(tl.uint32), (b_words >> 32).to(tl.uint32)
    b_best = tl.full([BLOCK_N], 64, tl.int32)
    for i_r in range(tl.load(p_counts + i_s)):
        i_probe = i_row * num_probes + i_r
        probe = tl.load(p_probes + i_probe)
        b_bits = popcount64(b_low ^ probe.to(tl.uint32), b_high ^ (probe >> 32).to(tl.uint32))
        b_near = tl.min(b_bits, 1)  # [BN]
        b_best = tl.minimum(b_best, b_near)
        if p_several is not None:  # noqa: SIM102 - decided when compiled, the other when run
            if is_several:
                tl.store(p_nearest + i_probe * num_pages + o_n, b_near.to(tl.uint8), mask=m_n)
                tl.atomic_add(p_sums + i_probe, tl.sum(tl.where(m_n, b_near, 0)), sem="relaxed")
    b_scores = tl.where(m_n, (64 - b_best).to(tl.float32), float("-inf"))
    tl.store(p_out, b_scores, mask=o_n < num_pages)  # of several tokens: to be overwritten


@triton.jit
def _excess_kernel(  # type: ignore[no-untyped-def]
    p_counts, p_begin, p_end, p_scores, p_several, p_nearest, p_sums, num_probes, num_pages,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of windows of several tokens, from the distances and their sums over pages."""
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    limit = far_limit(p_counts, p_begin, p_end, i_s)
    if (tl.load(p_several + i_s) == 0) | (i_n * BLOCK_N >= limit):
        return
    i_row = (i_s * tl.num_programs(1) + i_h).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < limit
    b_best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for i_r in range(tl.load(p_counts + i_s)):
        i_probe = i_row * num_probes + i_r
        mean = tl.div_rn(tl.load(p_sums + i_probe).to(tl.float32), limit.to(tl.float32))
        b_near = tl.load(p_nearest + i_probe * num_pages + o_n, mask=m_n, other=0)  # [BN]
        b_best = tl.maximum(b_best, mean - b_near.to(tl.float32))
    tl.store(p_scores + i_row * num_pages + o_n, b_best, mask=m_n)


def hash_scores(
    words: torch.Tensor, probes: torch.Tensor, counts: torch.Tensor, far: FarPages,
    scores: torch.Tensor, several: Several | None = None,
) -> None:  # fmt: skip
    """Scores the far pages of every window; the rest of a row becomes minus infinity.

    Args:
        words: ``[pages, Hk, P]`` int64 of the keys.
        probes: ``[S, Hk, R]`` int64 of the probes.
        counts: ``[S]`` int32 probes of each window, at most R; with 0 its row is minus infinity.
        far: The far pages, at most N a window.
        scores: ``[S, Hk, N]`` float32, written.
        several: For windows of several tokens. None: there are none.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or N is too large.
    """
    far.check(counts, scores, words.shape[1])
    windows, heads, pages = scores.shape
    num_probes, page = probes.shape[2], words.shape[2]
    check("words", words, ("pages", heads, "P"), torch.int64)
    check_page(page)
    check("probes", probes, (windows, heads, "R"), torch.int64)
    check_devices(words=words, probes=probes, scores=scores)
    flags, nearest, sums = several if several else (None, None, None)
    if several:
        _check_several(several, (windows, heads, num_probes, pages))
        several.sums.zero_()
    if not scores.numel():
        return
    block = BLOCK_WORDS // page
    _nearest_kernel[(triton.cdiv(pages, block), heads, windows)](
        words, probes, counts, *far, scores, flags, nearest, sums,
        far.block_table.stride(0), num_probes, pages, PAGE=page, BLOCK_N=block,
    )  # fmt: skip
    if several:
        _excess_kernel[(triton.cdiv(pages, BLOCK_EXCESS), heads, windows)](
            counts, far.begin, far.end, scores, flags, nearest, sums, num_probes, pages,
            BLOCK_N=BLOCK_EXCESS,
        )  # fmt: skip


def _check_several(several: Several, shape: tuple[int, int, int, int]) -> None:
    """Refuses scratch of another shape than ``[S, Hk, R, N]``."""
    windows, _, _, pages = shape
    check("several.flags", several.flags, (windows,), torch.bool)
    check("several.nearest", several.nearest, shape, torch.uint8)
    check("several.sums", several.sums, shape[:3], torch.int32)
    check_devices(**several._asdict())
    require(
        pages <= MOST_PAGES,
        f"hash_scores takes up to {MOST_PAGES} far pages for windows of several tokens, "
        f"not {pages}.",
    )


def hash_scores_reference(
    words: torch.Tensor, probes: torch.Tensor, counts: torch.Tensor, far: FarPages,
    scores: torch.Tensor, several: Several | None = None,
) -> None:  # fmt: skip
    """Twin of :func:`hash_scores` in plain torch."""
    bits = torch.arange(64, device=words.device)
    scores.fill_(-torch.inf)
    for s, count in enumerate(counts.tolist()):
        pages = far.pages(s)
        if not count or not len(pages):
            continue
        mine = words[pages].transpose(0, 1)[:, None]  # [Hk, 1, N, P]
        differ = mine ^ probes[s, :, :count, None, None]  # [Hk, R, N, P]
        distance = (differ[..., None] >> bits & 1).sum(-1).amin(-1)  # [Hk, R, N]
        if several and several.flags[s]:
            mean = distance.double().mean(-1, keepdim=True).float()
            scores[s, :, : len(pages)] = (mean - distance).amax(1)
        else:
            scores[s, :, : len(pages)] = (64 - distance.amin(1)).float()


_INDEX = "*i64 *i64 *i32 *i32 *i32 *i32 *i32 *fp32"
COMPILED = (
    *(
        Variant(
            _nearest_kernel, f"{_INDEX} *i1 *u8 *i32 i32 i32 i32",
            {"PAGE": page, "BLOCK_N": BLOCK_WORDS // page},
        )
        for page in (16, 128)
    ),
    Variant(
        _nearest_kernel, f"{_INDEX} i32 i32 i32",
        {
            "p_several": None, "p_nearest": None, "p_sums": None,
            "PAGE": 32, "BLOCK_N": BLOCK_WORDS // 32,
        },
    ),
    Variant(
        _excess_kernel, "*i32 *i32 *i32 *fp32 *i1 *u8 *i32 i32 i32", {"BLOCK_N": BLOCK_EXCESS}
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
