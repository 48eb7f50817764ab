"""Scores of far pages by their means, where pages of chunks that promise little are left out.

The twin on CPU is :class:`kvplug.index.chunk_mean.ChunkMeanIndex` (HCAM, Lampinen et al. 2021,
arXiv 2105.14039): ``scale * max over probes of q . mean``, or the mean over them, of chunks first;
the best chunks are looked into, and the same is then asked of their pages. NaN and infinities rank
below every number, and of equal chunks the newest wins. A launch scores chunks, one ranks them, and
one scores pages: the means of pages of chunks that are not looked into are never loaded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import FLOATS, check, check_devices, check_head_dim, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.far_pages import FarPages
from kvplug.kernels.top_pages import CHUNK, is_wanted, order_of, threshold_of

BLOCK = 4096
"""Numbers of means that a program keeps in registers while every probe passes over them."""
BLOCK_C = 1024
"""Chunks that a program ranks in a step. Not measured: no GPU was at hand."""


class Looks(NamedTuple):
    """How the two levels are searched."""

    per_chunk: int
    """Pages of a chunk, at least 1; chunks begin at multiples of it in the context."""
    chunks: int
    """Chunks that a window looks into, at least 1; of a window with no more, all."""
    agree: bool = False
    """Whether all KV heads share the scores that their probes give together."""
    add: bool = False
    """Whether probes' logits are averaged; else the largest counts."""


class ChunkScratch(NamedTuple):
    """Scratch for windows of up to C whole chunks, ``C = N // per_chunk``."""

    scores: torch.Tensor
    """``[S, Hk, C]`` float32."""
    looked: torch.Tensor
    """``[S, Hk, C]`` uint8."""


@triton.jit
def _whole_chunks(p_counts, p_begin, p_end, i_s, per_chunk):  # type: ignore[no-untyped-def]
    """A window's first chunk that lies among its far pages as a whole, and how many do."""
    first = tl.cdiv(tl.load(p_begin + i_s), per_chunk)
    last = tl.maximum(tl.load(p_end + i_s) // per_chunk, first)
    return first, tl.where(tl.load(p_counts + i_s) > 0, last - first, 0)


@triton.jit
def _relevance_kernel(  # type: ignore[no-untyped-def]
    p_means, p_vectors, p_counts, p_table, p_request, p_begin, p_end, p_looked, p_scores,
    table_stride, num_probes, num_entries, num_chunks, per_chunk, scale, heads,
    OF_CHUNKS: tl.constexpr, AGREE: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N chunks or pages of one head, or of all that agree."""
    i_n, i_h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_row = i_s.to(tl.int64) * heads
    o_n, o_d = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_d = o_d < D
    count = tl.load(p_counts + i_s)
    first, chunks = _whole_chunks(p_counts, p_begin, p_end, i_s, per_chunk)
    begin = tl.load(p_begin + i_s)
    if OF_CHUNKS:
        limit = chunks
        b_logical = (first + o_n + 1) * per_chunk - 1  # where a chunk's mean lies
    else:
        limit = tl.where(count > 0, tl.load(p_end + i_s) - begin, 0)
        b_logical = begin + o_n
    m_n = o_n < limit
    if p_looked is not None:
        b_chunk = b_logical // per_chunk - first
        m_whole = m_n & (b_chunk >= 0) & (b_chunk < chunks)
        p_flags = p_looked + (i_row + i_h) * num_chunks + b_chunk
        m_n &= tl.load(p_flags, mask=m_whole, other=1) != 0
    p_pages = p_table + tl.load(p_request + i_s).to(tl.int64) * table_stride
    b_pages = tl.load(p_pages + b_logical, mask=m_n, other=0).to(tl.int64)  # [BN]
    b_best = tl.full([BLOCK_N], float("nan"), tl.float32)
    b_total = tl.zeros([BLOCK_N], dtype=tl.float32)
    until = heads if AGREE else i_h + 1
    if tl.sum(m_n.to(tl.int32), 0) > 0:
        for h in range(i_h, until):
            o_row = (b_pages * heads + h) * D
            m_nd = m_n[:, None] & m_d[None, :]
            b_mean = tl.load(p_means + o_row[:, None] + o_d[None, :], mask=m_nd, other=0.0)
            b_mean = b_mean.to(tl.float32)  # [BN, BD]
            for i_r in range(count):
                p_vector = p_vectors + ((i_row + h) * num_probes + i_r) * D + o_d
                b_query = tl.load(p_vector, mask=m_d, other=0.0).to(tl.float32)
                b_product = tl.sum(b_mean * b_query[None, :], 1)  # [BN]
                if ADD:
                    b_total += b_product
                else:
                    m_better = (b_product > b_best) | (b_best != b_best)
                    b_best = tl.where(m_better, b_product, b_best)
    if ADD:
        number = tl.full([BLOCK_N], tl.maximum(count * (until - i_h), 1), tl.float32)
        b_best = tl.div_rn(b_total, number)
    b_scores = tl.where(m_n, scale * b_best, float("-inf"))
    for h in range(i_h, until):
        p_out = p_scores + (i_row + h) * num_entries + o_n
        tl.store(p_out, b_scores, mask=o_n < num_entries)


@triton.jit
def _looked_kernel(  # type: ignore[no-untyped-def]
    p_scores, p_counts, p_begin, p_end, p_looked, num_chunks, per_chunk, wanted,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """1 for the best chunks of one row, 0 for the others."""
    i_s = tl.program_id(0)
    i_row = (i_s * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    _, limit = _whole_chunks(p_counts, p_begin, p_end, i_s, per_chunk)
    p_row = p_scores + i_row * num_chunks
    wanted = tl.minimum(wanted, limit)
    threshold, skip = tl.full([], 0, tl.uint32), limit * 0
    if wanted < limit:
        threshold, skip = threshold_of(p_row, None, limit, limit, wanted, 1, CHUNK, BLOCK_N)
    seen = limit * 0
    for e in range(0, limit, BLOCK_N):
        o_e = e + tl.arange(0, BLOCK_N)
        m_e = o_e < limit
        b_order = order_of(tl.load(p_row + o_e, mask=m_e, other=0.0))
        m_looked, seen = is_wanted(b_order, m_e, threshold, skip, seen)
        tl.store(p_looked + i_row * num_chunks + o_e, m_looked.to(tl.uint8), mask=m_e)


def chunk_scores(
    means: torch.Tensor, chunks: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor,
    far: FarPages, scale: float, looks: Looks, scratch: ChunkScratch, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Scores far pages by their means; those not looked into, and a row's rest, are minus infinity.

    A chunk counts that lies among a window's far pages as a whole; other pages are always scored. A
    score is NaN where every logit is, and where logits are averaged, if one is.

    Args:
        means: ``[pages, Hk, D]`` bfloat16.
        chunks: ``[pages, Hk, D]`` bfloat16 means of the chunks that end with a page.
        vectors: ``[S, Hk, R, D]`` bfloat16, float16 or float32 probes.
        counts: ``[S]`` int32 probes of each window, at most R; with 0 its row is minus infinity.
        far: The far pages, at most N a window.
        scale: Of the layer's logits.
        looks: How they are searched.
        scratch: Of C chunks.
        scores: ``[S, Hk, N]`` float32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or a number is below 1.
    """
    heads, dim = means.shape[1:]
    far.check(counts, scores, heads)
    windows, _, pages = scores.shape
    check("means", means, ("pages", heads, dim), torch.bfloat16)
    check("chunks", chunks, means.shape, torch.bfloat16)
    check_head_dim(dim)
    check("vectors", vectors, (windows, heads, "R", dim), FLOATS)
    require(
        looks.per_chunk >= 1 and looks.chunks >= 1,
        f"chunk_scores needs at least one page a chunk and one chunk, not {looks}.",
    )
    whole = pages // looks.per_chunk
    check("scratch.scores", scratch.scores, (windows, heads, whole), torch.float32)
    check("scratch.looked", scratch.looked, (windows, heads, whole), torch.uint8)
    check_devices(means=means, chunks=chunks, vectors=vectors, **scratch._asdict())
    check_devices(means=means, scores=scores)
    if not scores.numel():
        return
    # Where all chunks are looked into, their own means say nothing.
    is_ranked = looks.chunks < whole
    if is_ranked:
        _relevance(chunks, True, vectors, counts, far, scale, looks, None, scratch.scores)
        _looked_kernel[(windows, heads)](
            scratch.scores, counts, far.begin, far.end, scratch.looked, whole, looks.per_chunk,
            looks.chunks, CHUNK=CHUNK, BLOCK_N=BLOCK_C,
        )  # fmt: skip
    looked = scratch.looked if is_ranked else None
    _relevance(means, False, vectors, counts, far, scale, looks, looked, scores)


def _relevance(
    means: torch.Tensor, of_chunks: bool, vectors: torch.Tensor, counts: torch.Tensor,
    far: FarPages, scale: float, looks: Looks, looked: torch.Tensor | None, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Scores one level."""
    heads, dim = means.shape[1:]
    windows, _, entries = scores.shape
    block_d = triton.next_power_of_2(dim)
    block_n = BLOCK // block_d
    grid = triton.cdiv(entries, block_n), 1 if looks.agree else heads, windows
    _relevance_kernel[grid](
        means, vectors, counts, *far, looked, scores, far.block_table.stride(0), vectors.shape[2],
        entries, 0 if looked is None else looked.shape[2], looks.per_chunk, scale, heads,
        OF_CHUNKS=of_chunks, AGREE=looks.agree, ADD=looks.add, D=dim, BLOCK_N=block_n,
        BLOCK_D=block_d,
    )  # fmt: skip


def chunk_scores_reference(
    means: torch.Tensor, chunks: torch.Tensor, vectors: torch.Tensor, counts: torch.Tensor,
    far: FarPages, scale: float, looks: Looks, scratch: ChunkScratch, scores: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`chunk_scores` in plain torch; float64 scores are computed in float64."""
    scores.fill_(-torch.inf)
    size = looks.per_chunk
    for s, (count, begin, end) in enumerate(
        zip(counts.tolist(), far.begin.tolist(), far.end.tolist(), strict=True)
    ):
        if not count or end <= begin:
            continue
        table = far.block_table[int(far.request[s])].long()
        query = vectors[s, :, :count].to(scores.dtype)  # [Hk, R, D]
        found = scale * _relevance_reference(means[table[begin:end]], query, looks)  # [Hk, N]
        whole = range(-(-begin // size), max(end // size, -(-begin // size)))
        if looks.chunks < len(whole):
            ends = table[[(c + 1) * size - 1 for c in whole]]
            ranks = _relevance_reference(chunks[ends], query, looks)
            ranks = ranks.where(ranks.isfinite(), -torch.inf).flip(1)
            order = ranks.sort(dim=1, descending=True, stable=True).indices
            for head, worst in enumerate(order[:, looks.chunks :].tolist()):
                for rank in worst:
                    page = whole[len(whole) - 1 - rank] * size - begin
                    found[head, page : page + size] = -torch.inf
        scores[s, :, : end - begin] = found


def _relevance_reference(means: torch.Tensor, query: torch.Tensor, looks: Looks) -> torch.Tensor:
    """``[Hk, N]`` of ``[N, Hk, D]`` means."""
    logits = torch.einsum("hrd,nhd->hrn", query, means.to(query.dtype))
    heads = len(logits)
    if looks.agree:
        logits = logits.flatten(0, 1)[None]
    if looks.add:
        found = logits.mean(1)
    else:
        best = logits.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1)
        found = best.masked_fill(logits.isnan().all(1), torch.nan)
    return found.expand(heads, -1).clone()


_TYPES = "*bf16 *{} *i32 *i32 *i32 *i32 *i32{} *fp32 i32 i32 i32 i32 i32 fp32 i32"


def _compiled(dtype: str, dim: int, of_chunks: bool, agree: bool, add: bool) -> Variant:
    """One way to launch."""
    block_d = triton.next_power_of_2(dim)
    sizes = {"D": dim, "BLOCK_N": BLOCK // block_d, "BLOCK_D": block_d}
    left_out = {"p_looked": None} if of_chunks else {}
    return Variant(
        _relevance_kernel, _TYPES.format(dtype, "" if of_chunks else " *u8"),
        left_out | {"OF_CHUNKS": of_chunks, "AGREE": agree, "ADD": add} | sizes,
    )  # fmt: skip


COMPILED = (
    _compiled("fp32", 128, True, False, False),
    _compiled("fp32", 128, False, False, False),
    _compiled("bf16", 80, False, True, True),
    _compiled("bf16", 256, True, True, True),
    Variant(
        _looked_kernel,
        "*fp32 *i32 *i32 *i32 *u8 i32 i32 i32",
        {"CHUNK": CHUNK, "BLOCK_N": BLOCK_C},
    ),
)
"""For :mod:`kvplug.kernels.compile_check`."""
