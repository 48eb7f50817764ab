"""Pages settled for good when a window may first retrieve them: what their mass says of them.

The twins on CPU are :class:`kvplug.index.representative.RepresentativeIndex` (InfLLM, Xiao et al.
2024, arXiv 2402.04617), the mean of a page's keys of largest mass, and
:class:`kvplug.index.page_mass.PageMass` (after HAX, arXiv 2507.00449), the largest mass of its
keys. Sums are taken in float32, key by key in the order of the page, and rounded to the nearest
bfloat16, as on CPU.

A page that is settled has seen every position (:data:`SETTLED`), so it takes no more mass
(:mod:`kvplug.kernels.collect_mass`), is not settled again, and opens when its first slot is
written. Windows that have a page in common settle it in one launch to the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.bfloat16 import nearest_bits
from kvplug.kernels.checks import (
    FLOATS,
    check,
    check_devices,
    check_head_dim,
    check_page,
    require,
)
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.far_pages import FarPages, far_pages

SETTLED = tl.constexpr(2**31 - 1)
"""What a settled page has seen: a window that begins before it gives nothing."""
BLOCK_N = 64
"""Far pages that a program looks at; nearly always all are settled. Not measured: no GPU was at
hand."""


@triton.jit
def _heaviest(b_mass, top, PAGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``[P]`` 1 for the ``top`` keys of largest mass, of equal ones the newer; all without mass."""
    o_t = tl.arange(0, PAGE)
    b_chosen = tl.zeros([PAGE], dtype=tl.int32)
    if (tl.max(b_mass, 0) <= 0) | (top >= PAGE):
        b_chosen += 1
    else:
        for _ in range(top):
            b_rest = tl.where(b_chosen == 1, -1.0, b_mass)
            best = tl.max(tl.where(b_rest == tl.max(b_rest, 0), o_t, -1), 0)
            b_chosen = tl.where(o_t == best, 1, b_chosen)
    return b_chosen


@triton.jit
def _settle_kernel(  # type: ignore[no-untyped-def]
    p_keys, p_mass, p_seen, p_table, p_request, p_begin, p_end, p_vectors, p_largest,
    table_stride, stride_page, stride_token, stride_head, top,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Settles those of BLOCK_N far pages of one window and KV head that are not settled."""
    i_n, i_h, i_s = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    limit = tl.load(p_end + i_s) - tl.load(p_begin + i_s)
    if i_n >= limit:
        return
    o_n, o_t, o_d = i_n + tl.arange(0, BLOCK_N), tl.arange(0, PAGE), tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < limit, o_d < D
    b_pages = far_pages(p_table, p_request, p_begin, table_stride, i_s, o_n, m_n)  # [BN]
    b_seen = tl.load(p_seen + b_pages * heads + i_h, mask=m_n, other=SETTLED)
    b_open = (b_seen != SETTLED).to(tl.int32)
    # Another program may settle a page meanwhile; then it is settled twice, to the same bits.
    for _ in range(tl.sum(b_open, 0)):
        first = tl.min(tl.where(b_open == 1, o_n, i_n + BLOCK_N), 0)
        b_open = tl.where(o_n == first, 0, b_open)
        i_page = tl.sum(tl.where(o_n == first, b_pages, 0), 0)
        i_row = i_page * heads + i_h
        b_mass = tl.load(p_mass + i_row * PAGE + o_t)  # [P]
        if p_largest is not None:
            tl.store(p_largest + i_row, tl.max(b_mass, 0))
        if p_vectors is not None:
            b_chosen = _heaviest(b_mass, top, PAGE)
            wanted = tl.sum(b_chosen, 0)
            p_page = p_keys + i_page * stride_page + i_h.to(tl.int64) * stride_head
            b_total = tl.zeros([BLOCK_D], dtype=tl.float32)
            for _ in range(wanted):
                token = tl.min(tl.where(b_chosen == 1, o_t, PAGE), 0)
                b_chosen = tl.where(o_t == token, 0, b_chosen)
                p_key = p_page + token.to(tl.int64) * stride_token + o_d
                b_total += tl.load(p_key, mask=m_d, other=0.0).to(tl.float32)
            number = tl.full([BLOCK_D], wanted, tl.float32)
            b_bits = nearest_bits(tl.div_rn(b_total, number))  # [BD]
            tl.store(p_vectors + i_row * D + o_d, b_bits, mask=m_d)
        tl.store(p_seen + i_row, SETTLED)


def settle_pages(
    keys: torch.Tensor, far: FarPages, most_far: int, mass: torch.Tensor, seen: torch.Tensor,
    vectors: torch.Tensor | None = None, top: int = 1, largest: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Settles the far pages of windows that are not settled; all of their keys are in the cache.

    Args:
        keys: ``[pages, P, Hk, D]`` bfloat16, float16 or float32, any strides but for the last
            dimension, which is contiguous.
        far: Of the windows.
        most_far: Far pages of the window that has most of them.
        mass: ``[pages, Hk, P]`` float32.
        seen: ``[pages, Hk]`` int32, written: :data:`SETTLED` at these pages.
        vectors: ``[pages, Hk, D]`` bfloat16, written: mean of the ``top`` keys of largest mass, of
            all keys where no mass is above 0. Or None.
        top: Keys that stand for a page, at least 1.
        largest: ``[pages, Hk]`` float32, written: largest mass of a key. Or None.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, both outputs are None, or
            no key is to stand for a page.
    """
    check("keys", keys, ("pages", "P", "Hk", "D"), FLOATS, contiguous=False)
    num_pages, page, heads, dim = keys.shape
    check_page(page)
    check_head_dim(dim)
    check("mass", mass, (num_pages, heads, page), torch.float32)
    check("seen", seen, (num_pages, heads), torch.int32)
    check("block_table", far.block_table, ("B", "max_pages"), torch.int32, contiguous=False)
    for name, column in zip(far._fields[1:], far[1:], strict=True):
        check(name, column, (len(far.request),), torch.int32)
    require(vectors is not None or largest is not None, "settle_pages needs vectors or largest.")
    require(top >= 1, f"settle_pages needs top >= 1, not {top}.")
    bits = None
    if vectors is not None:
        check("vectors", vectors, (num_pages, heads, dim), torch.bfloat16)
        bits = vectors.view(torch.int16)
    if largest is not None:
        check("largest", largest, (num_pages, heads), torch.float32)
    check_devices(
        keys=keys, mass=mass, seen=seen, vectors=vectors, largest=largest, **far._asdict()
    )
    if not len(far.request) or most_far < 1:
        return
    _settle_kernel[(triton.cdiv(most_far, BLOCK_N), heads, len(far.request))](
        keys, mass, seen, *far, bits, largest, far.block_table.stride(0), *keys.stride()[:3], top,
        PAGE=page, D=dim, BLOCK_N=BLOCK_N, BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip


def settle_pages_reference(
    keys: torch.Tensor, far: FarPages, most_far: int, mass: torch.Tensor, seen: torch.Tensor,
    vectors: torch.Tensor | None = None, top: int = 1, largest: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Twin of :func:`settle_pages` in plain torch."""
    for window in range(len(far.request)):
        for page in far.pages(window).tolist():
            for head in range(keys.shape[2]):
                if seen[page, head] == SETTLED.value:
                    continue
                seen[page, head] = SETTLED.value
                mine = mass[page, head]
                if largest is not None:
                    largest[page, head] = mine.max()
                if vectors is not None:
                    order = mine.flip(0).sort(descending=True, stable=True).indices
                    chosen = sorted((len(mine) - 1 - order[:top]).tolist())
                    chosen = chosen if mine.max() > 0 else list(range(len(mine)))
                    total = torch.zeros(keys.shape[3], device=keys.device)
                    for token in chosen:
                        total += keys[page, token, head].float()
                    # By a tensor: torch multiplies by a number's inverse.
                    mean = total / torch.full_like(total, len(chosen))
                    vectors[page, head] = mean.bfloat16()


_TYPES = "*{} *fp32 *i32 *i32 *i32 *i32 *i32 {} i32 i32 i32 i32 i32"


def _compiled(dtype: str, page: int, dim: int, outputs: str, left_out: dict[str, None]) -> Variant:
    """One way to launch."""
    sizes = {
        "PAGE": page, "D": dim, "BLOCK_N": BLOCK_N, "BLOCK_D": triton.next_power_of_2(dim),
    }  # fmt: skip
    return Variant(_settle_kernel, _TYPES.format(dtype, outputs), left_out | sizes)


COMPILED = (
    _compiled("bf16", 32, 128, "*i16", {"p_largest": None}),
    _compiled("fp16", 128, 80, "*i16", {"p_largest": None}),
    _compiled("bf16", 64, 256, "*fp32", {"p_vectors": None}),
)
"""For :mod:`kvplug.kernels.compile_check`."""
