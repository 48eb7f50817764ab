"""Summaries of whole pages of keys: their mean, and the least and largest of every dimension.

The twins on CPU are :mod:`kvplug.index.chunk_mean` (HCAM, Lampinen et al. 2021, 2105.14039) and
:mod:`kvplug.index.minmax` (Quest, Tang et al. 2024, 2406.10774). Sums are taken in float32. Means
are rounded to the nearest bfloat16, bounds outwards, so that they stay bounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.bfloat16 import nearest_bits, outward_bits
from kvplug.kernels.checks import (
    FLOATS,
    check,
    check_devices,
    check_head_dim,
    check_page,
    require,
)
from kvplug.kernels.compile_check import Variant

BLOCK_T = 16
"""Tokens that a program loads at a time; divides every page size."""


@triton.jit
def _page_statistics_kernel(  # type: ignore[no-untyped-def]
    p_keys, p_pages, p_means, p_bounds, stride_page, stride_token, stride_head,
    OF_SLOTS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One page of one head, every key loaded once."""
    i_n, i_h = tl.program_id(0), tl.program_id(1)
    i_page = tl.load(p_pages + i_n).to(tl.int64)
    if OF_SLOTS:
        # Pages fill in order: the last slot stands for its page, the others for none.
        i_page = tl.where(i_page % PAGE == PAGE - 1, i_page // PAGE, -1)
    if i_page < 0:
        return
    o_d, o_t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    m_d = o_d < D
    p_page = p_keys + i_page * stride_page + i_h.to(tl.int64) * stride_head
    p_block = p_page + o_t.to(tl.int64)[:, None] * stride_token + o_d[None, :]  # [BT, BD]
    b_sums = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    b_low = tl.full([BLOCK_T, BLOCK_D], float("inf"), tl.float32)
    b_high = tl.full([BLOCK_T, BLOCK_D], float("-inf"), tl.float32)
    for _t in range(0, PAGE, BLOCK_T):
        b_keys = tl.load(p_block, mask=m_d[None, :], other=0.0).to(tl.float32)  # [BT, BD]
        b_sums += b_keys
        b_low = tl.minimum(b_low, b_keys)
        b_high = tl.maximum(b_high, b_keys)
        p_block += BLOCK_T * stride_token
    i_row = i_page * tl.num_programs(1) + i_h
    if p_means is not None:
        b_mean = tl.sum(b_sums, 0) / PAGE  # [BD]; PAGE is a power of 2, so this rounds nothing
        tl.store(p_means + i_row * D + o_d, nearest_bits(b_mean), mask=m_d)
    if p_bounds is not None:
        p_row = p_bounds + i_row * (2 * D) + o_d
        tl.store(p_row, outward_bits(tl.min(b_low, 0), False), mask=m_d)
        tl.store(p_row + D, outward_bits(tl.max(b_high, 0), True), mask=m_d)


def page_statistics(
    keys: torch.Tensor,
    pages: torch.Tensor,
    means: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
) -> None:
    """Summarises pages that are whole; of keys that are NaN, bounds know nothing.

    Args:
        keys: ``[pages, P, Hk, D]`` bfloat16, float16 or float32, any strides but for the last
            dimension, which is contiguous.
        pages: ``[n]`` int32 or int64, the pages to summarise; a negative one is padding.
        means: ``[pages, Hk, D]`` bfloat16, written, or None.
        bounds: ``[pages, Hk, 2, D]`` bfloat16, written: minima, then maxima. Or None.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or both are None.
    """
    check("pages", pages, ("n",), (torch.int32, torch.int64))
    _launch(keys, pages, False, means, bounds)


def filled_page_statistics(
    keys: torch.Tensor,
    slots: torch.Tensor,
    means: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
) -> None:
    """Summarises the pages that new keys fill: those whose last slot is among theirs.

    Args:
        keys: As :func:`page_statistics` has them, the new ones and those before them.
        slots: ``[T]`` int64, ``page * P + offset``, of the new keys; a negative one is padding.
        means: ``[pages, Hk, D]`` bfloat16, written at these pages, or None.
        bounds: ``[pages, Hk, 2, D]`` bfloat16, written at these pages, or None.

    Raises:
        ValueError: See :func:`page_statistics`.
    """
    check("slots", slots, ("T",), torch.int64)
    _launch(keys, slots, True, means, bounds)


def _launch(
    keys: torch.Tensor, places: torch.Tensor, are_slots: bool,
    means: torch.Tensor | None, bounds: torch.Tensor | None,
) -> None:  # fmt: skip
    """Checks what both launchers share, and runs the kernel."""
    check("keys", keys, ("pages", "P", "Hk", "D"), FLOATS, contiguous=False)
    num_pages, page, heads, dim = keys.shape
    check_page(page)
    check_head_dim(dim)
    require(means is not None or bounds is not None, "page_statistics needs means or bounds.")
    if means is not None:
        check("means", means, (num_pages, heads, dim), torch.bfloat16)
    if bounds is not None:
        check("bounds", bounds, (num_pages, heads, 2, dim), torch.bfloat16)
    check_devices(keys=keys, places=places, means=means, bounds=bounds)
    if not len(places):
        return
    _page_statistics_kernel[(len(places), heads)](
        keys, places, _bits(means), _bits(bounds), *keys.stride()[:3],
        OF_SLOTS=are_slots, PAGE=page, D=dim, BLOCK_T=BLOCK_T,
        BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip


def _bits(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same memory as integers of 16 bits."""
    return None if tensor is None else tensor.view(torch.int16)


def page_statistics_reference(
    keys: torch.Tensor,
    pages: torch.Tensor,
    means: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
) -> None:
    """Twin of :func:`page_statistics` in plain torch."""
    known = pages[pages >= 0].long()
    mine = keys[known].float()  # [n, P, Hk, D]
    if means is not None:
        means[known] = mine.mean(1).bfloat16()
    if bounds is not None:
        for side, exact in ((0, mine.amin(1)), (1, mine.amax(1))):
            nearest = exact.bfloat16()
            outward = torch.tensor(torch.inf if side else -torch.inf, dtype=torch.bfloat16)
            falls_short = nearest.float() < exact if side else nearest.float() > exact
            further = nearest.nextafter(outward.to(keys.device))
            bounds[known, :, side] = torch.where(falls_short, further, nearest)


def filled_page_statistics_reference(
    keys: torch.Tensor,
    slots: torch.Tensor,
    means: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
) -> None:
    """Twin of :func:`filled_page_statistics` in plain torch."""
    page = keys.shape[1]
    last = slots[(slots >= 0) & (slots % page == page - 1)]
    page_statistics_reference(keys, last // page, means, bounds)


def _compiled(dtype: str, dim: int, are_slots: bool, left_out: dict[str, None]) -> Variant:
    """One way to launch; with means left out, as the backend for CUDA does it."""
    blocks = {"PAGE": 32, "D": dim, "BLOCK_T": BLOCK_T, "BLOCK_D": triton.next_power_of_2(dim)}
    outputs = "*i16" if left_out else "*i16 *i16"
    return Variant(
        _page_statistics_kernel, f"*{dtype} *i64 {outputs} i32 i32 i32",
        left_out | {"OF_SLOTS": are_slots} | blocks,
    )  # fmt: skip


COMPILED = (
    _compiled("bf16", 128, False, {}),
    _compiled("fp32", 80, False, {}),
    _compiled("fp16", 256, False, {}),
    _compiled("bf16", 128, True, {"p_means": None}),
)
"""For :mod:`kvplug.kernels.compile_check`."""
