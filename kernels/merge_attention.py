"""Attention over parts of a sequence, merged into attention over all of it.

With ``lse_i = log sum_j exp(logit_ij)`` of part ``i``, ``lse = log sum_i exp(lse_i)`` and
``out = sum_i exp(lse_i - lse) out_i`` (Rabe and Staats 2021, arXiv 2112.05682).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.bfloat16 import nearest_bits
from kvplug.kernels.checks import FLOATS, check, check_devices, check_head_dim
from kvplug.kernels.compile_check import Variant

BLOCK = 2048
"""Numbers of partial outputs that a program loads at a time. Not measured: no GPU was at hand."""
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def store_rounded(p_out, b_out, m_out):  # type: ignore[no-untyped-def]
    """Stores a float32 block as what is pointed to; bfloat16 is rounded to nearest everywhere."""
    if p_out.dtype.element_ty == tl.bfloat16:
        tl.store(p_out, nearest_bits(b_out).to(tl.bfloat16, bitcast=True), mask=m_out)
    else:
        tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def log_of_sum(base, total):  # type: ignore[no-untyped-def]
    """``base + log(total)``; minus infinity where ``total`` is 0."""
    return tl.where(total == 0, float("-inf"), base + tl.log2(tl.where(total == 0, 1, total)) * LN2)


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    p_parts, p_part_lse, p_out, p_lse, num, stride_token, stride_head,
    D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merges the parts of one token and head; those of minus infinity are not read."""
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    i_row = (i_t * tl.num_programs(1) + i_h).to(tl.int64)
    num_rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    o_d = tl.arange(0, BLOCK_D)
    b_most = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for i in range(0, num, BLOCK_P):
        o_p = i + tl.arange(0, BLOCK_P)
        p_block = p_part_lse + o_p * num_rows + i_row
        b_most = tl.maximum(b_most, tl.load(p_block, mask=o_p < num, other=float("-inf")))
    base = tl.max(b_most, 0)
    base = tl.where(base == float("-inf"), 0.0, base)
    b_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    total = 0.0
    for i in range(0, num, BLOCK_P):
        o_p = i + tl.arange(0, BLOCK_P)
        o_row = o_p * num_rows + i_row
        b_lse = tl.load(p_part_lse + o_row, mask=o_p < num, other=float("-inf"))
        b_weight = tl.exp2((b_lse - base) * LOG2E)  # [BP]
        m_part = (b_lse != float("-inf"))[:, None] & (o_d < D)[None, :]
        b_part = tl.load(p_parts + o_row[:, None] * D + o_d[None, :], mask=m_part, other=0.0)
        b_sum += tl.sum(b_part.to(tl.float32) * b_weight[:, None], 0)  # [BD]
        total += tl.sum(b_weight, 0)
    p_row = p_out + i_t.to(tl.int64) * stride_token + i_h * stride_head
    store_rounded(p_row + o_d, b_sum / tl.where(total == 0, 1, total), o_d < D)
    if p_lse is not None:
        tl.store(p_lse + i_row, log_of_sum(base, total))


def merge_attention(
    parts: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None = None
) -> None:
    """Merges outputs over ``n`` parts of what each token attends to.

    A part with a log-sum-exp of minus infinity has no say and is not read; without any other the
    output is 0, and its log-sum-exp minus infinity.

    Args:
        parts: ``[n, T, H, D]`` bfloat16, float16 or float32.
        part_lse: ``[n, T, H]`` float32 natural logarithms of the sums of exponentials.
        out: ``[T, H, D]`` bfloat16, float16 or float32, written; tokens and heads may be strided.
        lse: ``[T, H]`` float32, written. None: not wanted.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    check("parts", parts, ("n", "T", "H", "D"), FLOATS)
    num, tokens, heads, dim = parts.shape
    check_head_dim(dim)
    check("part_lse", part_lse, (num, tokens, heads), torch.float32)
    check("out", out, (tokens, heads, dim), FLOATS, contiguous=False)
    if lse is not None:
        check("lse", lse, (tokens, heads), torch.float32)
    check_devices(parts=parts, part_lse=part_lse, out=out, lse=lse)
    if not out.numel():
        return
    block_d = triton.next_power_of_2(dim)
    _merge_kernel[(tokens, heads)](
        parts, part_lse, out, lse, num, *out.stride()[:2],
        D=dim, BLOCK_P=BLOCK // block_d, BLOCK_D=block_d,
    )  # fmt: skip


def merge_attention_reference(
    parts: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None = None
) -> None:
    """Twin of :func:`merge_attention` in plain torch; in float64 if ``out`` is."""
    exact = torch.float64 if out.dtype == torch.float64 else torch.float32
    total = part_lse.to(exact).logsumexp(0)  # [T, H]
    weights = (part_lse.to(exact) - total).exp().nan_to_num(0.0)
    weights = weights.masked_fill(part_lse == -torch.inf, 0)
    used = parts.to(exact).masked_fill((part_lse == -torch.inf)[..., None], 0)
    out.copy_((used * weights[..., None]).sum(0))
    if lse is not None:
        lse.copy_(total)


COMPILED = tuple(
    Variant(
        _merge_kernel, f"{types} i32 i32 i32",
        {"D": dim, "BLOCK_P": BLOCK // block, "BLOCK_D": block} | optional,
    )
    for types, dim, block, optional in [
        ("*fp32 *fp32 *bf16 *fp32", 128, 128, {}),
        ("*bf16 *fp32 *bf16", 80, 128, {"p_lse": None}),
        ("*fp32 *fp32 *fp16", 256, 256, {"p_lse": None}),
    ]
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
