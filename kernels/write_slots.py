"""Writes a step's new keys and values to the slots of pages that the hot pool holds.

They are in the cold store by then. A page that goes on being filled is in the local region of the
step that fills it, so to read it back would be to move a whole page for every token; what the pool
does not hold is left to be read when it is listed. So a held page is the cold store's to the bit,
that of another request too whose page was freed and is filled anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, check_head_dim, check_page, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.slot_maps import SlotMaps

BLOCK = 16
"""Tokens of a program. Not measured: no GPU was at hand."""


@triton.jit
def _write_slots_kernel(  # type: ignore[no-untyped-def]
    p_keys, p_values, p_places, p_slot_of, p_pool, num_tokens, key_token, key_head, value_token,
    value_head, slot_stride, page, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one KV head."""
    i_h, o_t = tl.program_id(1), tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    b_place = tl.load(p_places + o_t, mask=o_t < num_tokens, other=-1)
    m_t = b_place >= 0
    b_place = tl.where(m_t, b_place, 0)
    p_slot = p_slot_of + (b_place // page) * tl.num_programs(1) + i_h
    b_slot = tl.load(p_slot, mask=m_t, other=-1)
    m_td = (m_t & (b_slot >= 0))[:, None] & (o_d < D)[None, :]
    if tl.max(b_slot, 0) >= 0:
        o_to = b_slot.to(tl.int64) * slot_stride + (b_place % page) * D
        p_to = p_pool + o_to[:, None] + o_d[None, :]
        o_token = o_t.to(tl.int64)
        o_key = o_token * key_token + i_h * key_head
        o_value = o_token * value_token + i_h * value_head
        b_keys = tl.load(p_keys + o_key[:, None] + o_d[None, :], mask=m_td)
        tl.store(p_to, b_keys, mask=m_td)
        b_values = tl.load(p_values + o_value[:, None] + o_d[None, :], mask=m_td)
        tl.store(p_to + page * D, b_values, mask=m_td)


def write_slots(
    keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor, maps: SlotMaps,
    pool: torch.Tensor,
) -> None:  # fmt: skip
    """Copies new keys and values to where the pool holds their pages.

    Args:
        keys: ``[T, Hk, D]`` of the pool's dtype, contiguous in the last dimension.
        values: ``[T, Hk, D]`` likewise.
        places: ``[T]`` int64 where they are in the cold store, ``page * P + offset``, each once;
            negative ones are padding.
        maps: Of the pool.
        pool: ``[slots, 2, P, D]`` of two bytes a number, written; contiguous but for the first
            dimension.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or head or page size are
            not supported.
    """
    maps.check()
    heads = maps.slot_of.shape[1]
    check("pool", pool, (len(maps.entry_in), 2, "P", "D"), pool.dtype, contiguous=False)
    page, dim = pool.shape[2:]
    check_page(page)
    check_head_dim(dim)
    require(
        pool.stride()[1:] == (page * dim, dim, 1) and pool.element_size() == 2,
        f"The pool must be of two bytes a number and contiguous but for the first dimension, not "
        f"{pool.dtype} of strides {pool.stride()}.",
    )
    check("keys", keys, ("T", heads, dim), pool.dtype, contiguous=False)
    check("values", values, tuple(keys.shape), pool.dtype, contiguous=False)
    check("places", places, (len(keys),), torch.int64)
    check_devices(keys=keys, values=values, places=places, pool=pool, slot_of=maps.slot_of)
    if not len(keys):
        return
    # Bits are moved, whatever number they are.
    keys, values, pool = (tensor.view(torch.int16) for tensor in (keys, values, pool))
    _write_slots_kernel[(triton.cdiv(len(keys), BLOCK), heads)](
        keys, values, places, maps.slot_of, pool, len(keys), *keys.stride()[:2],
        *values.stride()[:2], pool.stride(0), page, D=dim, BLOCK_T=BLOCK,
        BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip


def write_slots_reference(
    keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor, maps: SlotMaps,
    pool: torch.Tensor,
) -> None:  # fmt: skip
    """Twin of :func:`write_slots` in plain torch."""
    page = pool.shape[2]
    for t, place in enumerate(places.tolist()):
        if place < 0:
            continue
        for head, slot in enumerate(maps.slot_of[place // page].tolist()):
            if slot >= 0:
                pool[slot, 0, place % page] = keys[t, head]
                pool[slot, 1, place % page] = values[t, head]


COMPILED = tuple(
    Variant(
        _write_slots_kernel,
        "*i16 *i16 *i64 *i32 *i16 i32 i32 i32 i32 i32 i32 i32",
        {"D": dim, "BLOCK_T": BLOCK, "BLOCK_D": triton.next_power_of_2(dim)},
    )
    for dim in (80, 128, 256)
)
"""For :mod:`kvplug.kernels.compile_check`."""
