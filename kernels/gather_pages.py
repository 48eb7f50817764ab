"""Copies pages of single KV heads from the cold store into slots of the hot pool.

The cold store is the paged cache itself, in pinned host memory that the GPU reads across the bus,
or anywhere else that kernels can read. A copy is bitwise. Or keys are turned on the way: the rotary
embedding (Su et al. 2021, arXiv 2104.09864) is a rotation, so a key of position ``m`` turned by the
angles of ``d`` is the key of position ``m + d``. That is how InfLLM (Xiao et al. 2024, arXiv
2402.04617) and EM-LLM (Fountas et al. 2024, arXiv 2407.09450) keep positions within the trained
window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import FLOATS, check, check_devices, check_head_dim, check_page, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.merge_attention import store_rounded

BLOCK = 2048
"""Numbers that a program copies at a time. Not measured: no GPU was at hand."""
WORDS = tl.constexpr(4)
"""Numbers of 4 bytes in 16 bytes, which a thread copies at once."""
PROGRAMS = 4096
"""Entries that have programs of their own, which go on with others: most lists are longer than what
counts of them, and a grid has an end. Not measured: no GPU was at hand."""


class Rotation(NamedTuple):
    """Angles by which the keys of each entry are turned."""

    cos: torch.Tensor
    """``[n, rotary_dim / 2]`` float32."""
    sin: torch.Tensor
    """``[n, rotary_dim / 2]`` float32."""
    is_neox: bool
    """Whether dimension ``i`` is paired with ``i + rotary_dim / 2``, else ``2i`` with ``2i + 1``.
    Dimensions from ``rotary_dim`` on are copied."""


@triton.jit
def _entry(p_entries, i_n):  # type: ignore[no-untyped-def]
    """Page, head and slot of an entry."""
    p_entry = p_entries + i_n * 3
    page, head = tl.load(p_entry).to(tl.int64), tl.load(p_entry + 1).to(tl.int64)
    return page, head, tl.load(p_entry + 2).to(tl.int64)


@triton.jit
def _copy_pages_kernel(  # type: ignore[no-untyped-def]
    p_source, p_entries, p_valid, p_slots, stride_page, stride_part, stride_token, stride_head,
    stride_slot, first_part, PAGE: tl.constexpr, QUADS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Copies BLOCK_T tokens' keys or values of entries; a token has QUADS times 16 bytes."""
    i_t, i_part = tl.program_id(0), tl.program_id(1) + first_part
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_w = tl.arange(0, BLOCK_Q * WORDS)
    m_tw = (o_t < PAGE)[:, None] & (o_w < QUADS * WORDS)[None, :]
    for i_n in range(tl.program_id(2), tl.load(p_valid), tl.num_programs(2)):
        page, head, slot = _entry(p_entries, i_n)
        o_page = page * stride_page + i_part * stride_part + head * stride_head
        o_token = (o_page + o_t * stride_token) * WORDS
        p_from = p_source + o_token[:, None] + o_w[None, :]
        o_slot = slot * stride_slot + (i_part * PAGE + o_t) * QUADS
        p_to = p_slots + (o_slot * WORDS)[:, None] + o_w[None, :]
        tl.store(p_to, tl.load(p_from, mask=m_tw), mask=m_tw)


@triton.jit
def _turn_pages_kernel(  # type: ignore[no-untyped-def]
    p_source, p_entries, p_valid, p_slots, p_cos, p_sin, stride_page, stride_token, stride_head,
    stride_slot, PAGE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NEOX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Copies and turns BLOCK_T tokens' keys of entries."""
    i_t = tl.program_id(0)
    for i_n in range(tl.program_id(1), tl.load(p_valid), tl.num_programs(1)):
        page, head, slot = _entry(p_entries, i_n)
        o_t, o_i = i_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
        m_ti = (o_t < PAGE)[:, None] & (o_i < HALF)[None, :]
        p_from = p_source + page * stride_page + head * stride_head
        p_from += (o_t.to(tl.int64) * stride_token)[:, None]  # [BT, 1]
        p_to = p_slots + slot * stride_slot + (o_t * D)[:, None]
        o_angle = i_n * HALF + o_i
        b_cos = tl.load(p_cos + o_angle, mask=o_i < HALF, other=0.0)[None, :]  # [1, BH]
        b_sin = tl.load(p_sin + o_angle, mask=o_i < HALF, other=0.0)[None, :]
        if NEOX:
            b_x = tl.load(p_from + o_i[None, :], mask=m_ti, other=0.0).to(tl.float32)
            b_y = tl.load(p_from + HALF + o_i[None, :], mask=m_ti, other=0.0).to(tl.float32)
            store_rounded(p_to + o_i[None, :], b_x * b_cos - b_y * b_sin, m_ti)
            store_rounded(p_to + HALF + o_i[None, :], b_y * b_cos + b_x * b_sin, m_ti)
        else:  # both of a pair at once, or every line would be read twice
            o_pair = (2 * o_i[:, None] + tl.arange(0, 2)[None, :])[None, :, :]  # [1, BH, 2]
            m_pair = m_ti[:, :, None] & (o_pair >= 0)
            b_pair = tl.load(p_from[:, :, None] + o_pair, mask=m_pair, other=0.0)  # [BT, BH, 2]
            b_x, b_y = tl.split(b_pair.to(tl.float32))
            b_pair = tl.join(b_x * b_cos - b_y * b_sin, b_y * b_cos + b_x * b_sin)
            store_rounded(p_to[:, :, None] + o_pair, b_pair, m_pair)
        if 2 * HALF < D:
            o_r = 2 * HALF + tl.arange(0, BLOCK_R)
            m_tr = (o_t < PAGE)[:, None] & (o_r < D)[None, :]
            tl.store(p_to + o_r[None, :], tl.load(p_from + o_r[None, :], mask=m_tr), mask=m_tr)


def gather_pages(
    source: torch.Tensor, entries: torch.Tensor, num_valid: torch.Tensor, slots: torch.Tensor,
    rotation: Rotation | None = None,
) -> None:  # fmt: skip
    """Copies ``slots[slot] = source[page, :, :, head]`` for the first entries of a list.

    No slot may occur twice among them. All other slots are left alone.

    Args:
        source: ``[pages, 2, P, Hk, D]`` keys and values, contiguous in the last dimension, rows
            aligned to 16 bytes; on the slots' device or in pinned memory.
        entries: ``[n, 3]`` int32 or int64 page, head and slot.
        num_valid: ``[1]`` int32 number of entries that count, at most n.
        slots: ``[slots, 2, P, D]`` of the same dtype, written; contiguous but for the first
            dimension.
        rotation: By which keys are turned, in float32; they must be bfloat16, float16 or float32.
            None: they are copied.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device, or head or page size are
            not supported.
    """
    check("source", source, ("pages", 2, "P", "Hk", "D"), source.dtype, contiguous=False)
    page, dim = source.shape[2], source.shape[4]
    check_head_dim(dim)
    check_page(page)
    check("entries", entries, ("n", 3), (torch.int32, torch.int64))
    check("num_valid", num_valid, (1,), torch.int32)
    check("slots", slots, ("slots", 2, page, dim), source.dtype, contiguous=False)
    require(
        slots.stride()[1:] == (page * dim, dim, 1),
        f"Slots must be contiguous but for the first dimension, not of strides {slots.stride()}.",
    )
    check_devices(entries=entries, num_valid=num_valid, slots=slots)
    require(
        source.device == slots.device or source.is_pinned(),
        f"source must be on {slots.device} or in pinned memory, not on {source.device}.",
    )
    words, in_slots = _in_words(source), _in_words(slots)
    if rotation is not None:
        _check_rotation(rotation, entries, source, slots)
    if not len(entries):
        return
    *strides, _ = (stride // WORDS.value for stride in words.stride())
    quads = words.shape[4] // WORDS.value
    block_q = triton.next_power_of_2(quads)
    block_t = max(BLOCK // (block_q * WORDS.value), 1)
    first_part = 0 if rotation is None else 1
    programs = min(len(entries), PROGRAMS)
    _copy_pages_kernel[(triton.cdiv(page, block_t), 2 - first_part, programs)](
        words, entries, num_valid, in_slots, *strides, in_slots.stride(0) // WORDS.value,
        first_part, PAGE=page, QUADS=quads, BLOCK_T=block_t, BLOCK_Q=block_q,
    )  # fmt: skip
    if rotation is not None:
        _turn(source, entries, num_valid, slots, rotation)


def _in_words(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as numbers of 4 bytes, of which four can be copied at once."""
    size = tensor.element_size()
    require(
        all(stride * size % 16 == 0 for stride in tensor.stride()[:-1])
        and tensor.shape[-1] * size % 16 == 0
        and tensor.data_ptr() % 16 == 0,
        f"Rows of pages must be multiples of 16 bytes and begin at such, not {tensor.dtype} of "
        f"strides {tensor.stride()}.",
    )
    return tensor.view(torch.int32)


def _check_rotation(
    rotation: Rotation, entries: torch.Tensor, source: torch.Tensor, slots: torch.Tensor
) -> None:
    """Refuses angles that the kernel would read wrongly, and keys that it cannot turn."""
    num, dim = len(entries), source.shape[4]
    check("cos", rotation.cos, (num, "rotary_dim / 2"), torch.float32)
    check("sin", rotation.sin, tuple(rotation.cos.shape), torch.float32)
    check_devices(cos=rotation.cos, sin=rotation.sin, slots=slots)
    require(source.dtype in FLOATS, f"Keys of {source.dtype} cannot be turned.")
    half = rotation.cos.shape[1]
    require(1 <= half <= dim // 2, f"rotary_dim / 2 must be 1 to {dim // 2}, not {half}.")


def _turn(
    source: torch.Tensor, entries: torch.Tensor, num_valid: torch.Tensor, slots: torch.Tensor,
    rotation: Rotation,
) -> None:  # fmt: skip
    """Copies and turns the keys."""
    page, dim, half = source.shape[2], source.shape[4], rotation.cos.shape[1]
    block_h = triton.next_power_of_2(half)
    block_t = min(max(BLOCK // (2 * block_h), 1), page)
    stride_page, _, stride_token, stride_head, _ = source.stride()
    _turn_pages_kernel[(triton.cdiv(page, block_t), min(len(entries), PROGRAMS))](
        source, entries, num_valid, slots, rotation.cos, rotation.sin,
        stride_page, stride_token, stride_head, slots.stride(0),
        PAGE=page, D=dim, HALF=half, NEOX=rotation.is_neox, BLOCK_T=block_t, BLOCK_H=block_h,
        BLOCK_R=triton.next_power_of_2(max(dim - 2 * half, 1)),
    )  # fmt: skip


def gather_pages_reference(
    source: torch.Tensor, entries: torch.Tensor, num_valid: torch.Tensor, slots: torch.Tensor,
    rotation: Rotation | None = None,
) -> None:  # fmt: skip
    """Twin of :func:`gather_pages` in plain torch; turns in float64 if the slots are."""
    for i, (page, head, slot) in enumerate(entries[: int(num_valid)].tolist()):
        slots[slot] = source[page, :, :, head].to(slots)
        if rotation is None:
            continue
        exact = torch.float64 if slots.dtype == torch.float64 else torch.float32
        half = rotation.cos.shape[1]
        turned = source[page, 0, :, head, : 2 * half].to(slots.device, exact)  # [P, 2 * half]
        shape, pair = ((2, half), 1) if rotation.is_neox else ((half, 2), 2)
        first, second = turned.unflatten(1, shape).unbind(pair)
        cos, sin = rotation.cos[i].to(exact), rotation.sin[i].to(exact)
        pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], pair)
        slots[slot, 0, :, : 2 * half] = pairs.flatten(1).to(slots.dtype)


_TURN = "*bf16 *i32 *i32 *bf16 *fp32 *fp32 i32 i32 i32 i32"
COMPILED = (
    *(
        Variant(
            _copy_pages_kernel, f"*i32 *{integer} *i32 *i32 i32 i32 i32 i32 i32 i32",
            {"PAGE": page, "QUADS": quads, "BLOCK_T": block_t, "BLOCK_Q": block_q},
        )
        for integer, page, quads, block_t, block_q in [
            ("i32", 32, 16, 32, 16), ("i64", 128, 10, 32, 16), ("i32", 16, 32, 16, 32),
        ]
    ),
    *(
        Variant(
            _turn_pages_kernel, _TURN,
            {
                "PAGE": 32, "D": dim, "HALF": half, "NEOX": is_neox, "BLOCK_T": 16,
                "BLOCK_H": 64, "BLOCK_R": triton.next_power_of_2(max(dim - 2 * half, 1)),
            },
        )
        for dim, half, is_neox in [(128, 64, True), (96, 40, False)]
    ),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
