"""The probe vectors of several probes, one after the other.

The twin on CPU is :class:`kvplug.probe.union.UnionProbe`: what a probe adds to a window is left out
where the first ones gave just the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import FLOATS, check, check_devices, check_head_dim, require
from kvplug.kernels.compile_check import Variant

BLOCK = 1024
"""Numbers that a program compares or copies at a time."""


class ProbeVectors(NamedTuple):
    """Of the ``S`` windows of a call, by one probe."""

    vectors: torch.Tensor
    """``[S, Hk, R, D]`` bfloat16, float16 or float32; rows from ``counts`` on are not read."""
    counts: torch.Tensor
    """``[S]`` int32, how many of the R vectors each window has."""


@triton.jit
def _append_kernel(  # type: ignore[no-untyped-def]
    p_vectors, p_counts, p_filled, p_joined, p_total, kv_heads, most, room,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Appends one window's vectors, of all heads, unless it begins with the same."""
    i_s = tl.program_id(0)
    count, filled = tl.load(p_counts + i_s), tl.load(p_filled + i_s)
    first = i_s.to(tl.int64) * kv_heads
    o_r, o_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    b_differing = tl.zeros([BLOCK_R], dtype=tl.int32)
    for h in range(tl.where(filled < count, 0, kv_heads)):
        for r in range(0, count, BLOCK_R):
            m_rd = (r + o_r < count)[:, None] & (o_d < D)[None, :]
            o_rd = (r + o_r)[:, None] * D + o_d[None, :]
            b_new = tl.load(p_vectors + (first + h) * most * D + o_rd, mask=m_rd, other=0.0)
            b_old = tl.load(p_joined + (first + h) * room * D + o_rd, mask=m_rd, other=0.0)
            b_same = b_new.to(tl.float32) == b_old.to(tl.float32)  # NaN is never the same
            b_differing += tl.sum(tl.where(b_same, 0, 1), 1)
    is_there = (filled >= count) & (tl.sum(b_differing, 0) == 0)
    count = tl.where(is_there, 0, count)
    tl.store(p_total + i_s, filled + count)
    for h in range(kv_heads):
        for r in range(0, count, BLOCK_R):
            m_rd = (r + o_r < count)[:, None] & (o_d < D)[None, :]
            o_rd = (r + o_r)[:, None] * D + o_d[None, :]
            b_new = tl.load(p_vectors + (first + h) * most * D + o_rd, mask=m_rd)
            p_out = p_joined + ((first + h) * room + filled) * D
            tl.store(p_out + o_rd, b_new, mask=m_rd)


def join_probes(parts: Sequence[ProbeVectors], joined: torch.Tensor, filled: torch.Tensor) -> None:
    """Writes the vectors of all probes, window by window.

    Args:
        parts: Of each probe.
        joined: ``[S, Hk, R, D]`` float32, written up to the counts; R is the sum of the parts' R.
        filled: ``[parts + 1, S]`` int32, written: vectors of each window before each part; the last
            row has the counts.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    check("joined", joined, ("S", "Hk", "R", "D"), torch.float32)
    windows, kv_heads, room, dim = joined.shape
    check_head_dim(dim)
    check("filled", filled, (len(parts) + 1, windows), torch.int32)
    for number, (vectors, counts) in enumerate(parts):
        own = tuple(
            dict.fromkeys((joined.dtype, *(FLOATS if joined.dtype == torch.float32 else ())))
        )
        check(f"vectors of part {number}", vectors, (windows, kv_heads, "R", dim), own)
        check(f"counts of part {number}", counts, (windows,), torch.int32)
        check_devices(joined=joined, filled=filled, vectors=vectors, counts=counts)
    total = sum(vectors.shape[2] for vectors, _ in parts)
    require(total == room, f"joined has room for {room} vectors of {total}.")
    if not windows:
        return
    filled[0].zero_()
    block_d = triton.next_power_of_2(dim)
    for number, (vectors, counts) in enumerate(parts):
        _append_kernel[(windows,)](
            vectors, counts, filled[number], joined, filled[number + 1], kv_heads,
            vectors.shape[2], room, D=dim, BLOCK_R=BLOCK // block_d, BLOCK_D=block_d,
        )  # fmt: skip


def join_probes_reference(
    parts: Sequence[ProbeVectors], joined: torch.Tensor, filled: torch.Tensor
) -> None:
    """Twin of :func:`join_probes` in plain torch."""
    filled[0] = 0
    for number, (vectors, counts) in enumerate(parts):
        for s, count in enumerate(counts.tolist()):
            start, mine = int(filled[number, s]), vectors[s, :, :count].to(joined.dtype)
            is_there = start >= count and torch.equal(joined[s, :, :count], mine)
            filled[number + 1, s] = start + (0 if is_there else count)
            if not is_there:
                joined[s, :, start : start + count] = mine


_SHAPE = {"D": 128, "BLOCK_R": BLOCK // 128, "BLOCK_D": 128}
COMPILED = (
    Variant(_append_kernel, "*fp32 *i32 *i32 *fp32 *i32 i32 i32 i32", _SHAPE),
    Variant(_append_kernel, "*bf16 *i32 *i32 *fp32 *i32 i32 i32 i32", _SHAPE | {"D": 80}),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
