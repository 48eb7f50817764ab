"""Means of whole chunks of pages, from the means of their pages.

The twin on CPU is :class:`kvplug.index.chunk_mean.ChunkMeanIndex` (HCAM, Lampinen et al. 2021,
arXiv 2105.14039): sums in float32, page by page in the order of the context, rounded to the nearest
bfloat16. A chunk's mean lies at its last page: contexts that share that page share all before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.bfloat16 import nearest_bits
from kvplug.kernels.checks import check, check_devices, check_head_dim, require
from kvplug.kernels.compile_check import Variant


class ChunkEnds(NamedTuple):
    """The ``n`` chunks that a step completes."""

    request: torch.Tensor
    """``[n]`` int32 row of the block table."""
    end: torch.Tensor
    """``[n]`` int32 logical page after the chunk's last."""


@triton.jit
def _chunk_means_kernel(  # type: ignore[no-untyped-def]
    p_means, p_table, p_request, p_end, p_chunks, table_stride, per_chunk,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of one head."""
    i_n, i_h = tl.program_id(0), tl.program_id(1)
    heads, end = tl.num_programs(1), tl.load(p_end + i_n)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_pages = p_table + tl.load(p_request + i_n).to(tl.int64) * table_stride
    b_total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for i in range(end - per_chunk, end):
        o_row = (tl.load(p_pages + i).to(tl.int64) * heads + i_h) * D
        b_total += tl.load(p_means + o_row + o_d, mask=m_d, other=0.0).to(tl.float32)
    # Rounded to nearest, as on CPU, which a GPU's own division is not.
    b_mean = tl.div_rn(b_total, tl.full([BLOCK_D], per_chunk, tl.float32))  # [BD]
    o_last = (tl.load(p_pages + end - 1).to(tl.int64) * heads + i_h) * D
    tl.store(p_chunks + o_last + o_d, nearest_bits(b_mean), mask=m_d)


def chunk_means(
    means: torch.Tensor, block_table: torch.Tensor, ends: ChunkEnds, per_chunk: int,
    chunks: torch.Tensor,
) -> None:  # fmt: skip
    """Writes the mean of every chunk at its last page.

    Args:
        means: ``[pages, Hk, D]`` bfloat16 of whole pages, those of the chunks among them.
        block_table: ``[B, max_pages]`` int32 physical pages; rows may be strided.
        ends: The chunks.
        per_chunk: Pages of a chunk, at least 1.
        chunks: ``[pages, Hk, D]`` bfloat16, written at the chunks' last pages.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or a chunk has no pages.
    """
    check("means", means, ("pages", "Hk", "D"), torch.bfloat16)
    check("chunks", chunks, means.shape, torch.bfloat16)
    check_head_dim(means.shape[2])
    check("block_table", block_table, ("B", "max_pages"), torch.int32, contiguous=False)
    for name, column in ends._asdict().items():
        check(name, column, (len(ends.end),), torch.int32)
    require(per_chunk >= 1, f"A chunk has at least one page, not {per_chunk}.")
    check_devices(means=means, chunks=chunks, block_table=block_table, **ends._asdict())
    if not len(ends.end):
        return
    dim = means.shape[2]
    _chunk_means_kernel[(len(ends.end), means.shape[1])](
        means, block_table, *ends, chunks.view(torch.int16), block_table.stride(0), per_chunk,
        D=dim, BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip


def chunk_means_reference(
    means: torch.Tensor, block_table: torch.Tensor, ends: ChunkEnds, per_chunk: int,
    chunks: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`chunk_means` in plain torch."""
    for row, end in zip(ends.request.tolist(), ends.end.tolist(), strict=True):
        total = means.new_zeros(means.shape[1:], dtype=torch.float32)
        for page in block_table[row, end - per_chunk : end].tolist():
            total += means[page].float()
        # By a tensor: torch multiplies by a number's inverse.
        mean = total / torch.full_like(total, per_chunk)
        chunks[int(block_table[row, end - 1])] = mean.bfloat16()


COMPILED = tuple(
    Variant(
        _chunk_means_kernel, "*bf16 *i32 *i32 *i32 *i16 i32 i32",
        {"D": dim, "BLOCK_D": triton.next_power_of_2(dim)},
    )
    for dim in (80, 128, 256)
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
