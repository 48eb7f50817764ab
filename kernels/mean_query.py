"""A window's mean query, one of each query head.

The twin on CPU is :class:`kvplug.probe.mean.MeanProbe`: at decode the query itself, as Quest has it
(Tang et al. 2024, arXiv 2406.10774); windows of a prompt are averaged as in InfLLM (Xiao et al.
2024, arXiv 2402.04617). Sums are taken in float32, and means kept so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.distance import BLOCK, QueryWindows, window_sums


@triton.jit
def _mean_query_kernel(  # type: ignore[no-untyped-def]
    p_queries, p_start, p_count, p_vectors, p_counts, stride_token, stride_head,
    G: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean of one head's queries of one window, each loaded once."""
    i_s, i_h = tl.program_id(0), tl.program_id(1)
    count = tl.load(p_count + i_s)
    tl.store(p_counts + i_s, tl.where(count > 0, G, 0), mask=i_h == 0)
    if count <= 0:
        return
    start = tl.load(p_start + i_s).to(tl.int64)
    p_head = p_queries + start * stride_token + i_h.to(tl.int64) * stride_head
    b_sums = window_sums(p_head, stride_token, count, D, BLOCK_T, BLOCK_D)  # [BD]
    # Rounded to nearest, as on CPU, which a GPU's own division is not.
    b_mean = tl.div_rn(b_sums, tl.full([BLOCK_D], count, tl.float32))  # [BD]
    o_d = tl.arange(0, BLOCK_D)
    p_out = p_vectors + (i_s * tl.num_programs(1) + i_h).to(tl.int64) * D + o_d
    tl.store(p_out, b_mean, mask=o_d < D)


def mean_query(windows: QueryWindows, vectors: torch.Tensor, counts: torch.Tensor) -> None:
    """Mean query of each window and query head.

    A window of one token gives that token's query; one of none leaves its row alone.

    Args:
        windows: The queries.
        vectors: ``[S, Hk, G, D]`` float32, written.
        counts: ``[S]`` int32, written: vectors of each window, G or none.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    num, heads, kv_heads, dim = windows.check(vectors)
    group = heads // kv_heads
    check("vectors", vectors, (num, kv_heads, group, dim), torch.float32)
    check("counts", counts, (num,), torch.int32)
    check_devices(vectors=vectors, counts=counts)
    if not num:
        return
    block_d = triton.next_power_of_2(dim)
    _mean_query_kernel[(num, heads)](
        *windows, vectors, counts, *windows.queries.stride()[:2],
        G=group, D=dim, BLOCK_T=BLOCK // block_d, BLOCK_D=block_d,
    )  # fmt: skip


def mean_query_reference(
    windows: QueryWindows, vectors: torch.Tensor, counts: torch.Tensor
) -> None:
    """Twin of :func:`mean_query` in plain torch; float64 vectors are computed in float64."""
    for s in range(len(counts)):
        mine = windows.of(s).to(vectors.dtype)  # [c, H, D]
        counts[s] = vectors.shape[2] if len(mine) else 0
        if len(mine):
            vectors[s] = mine.mean(0).view_as(vectors[s])


COMPILED = tuple(
    Variant(
        _mean_query_kernel, f"*{dtype} *i32 *i32 *fp32 *i32 i32 i32",
        {
            "G": group, "D": dim, "BLOCK_T": BLOCK // triton.next_power_of_2(dim),
            "BLOCK_D": triton.next_power_of_2(dim),
        },
    )
    for dtype, group, dim in [("bf16", 4, 128), ("fp32", 3, 80), ("fp16", 8, 256)]
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
