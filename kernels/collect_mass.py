"""Attention mass by slot: what windows give is added up, in order, and forgotten with its keys.

The twin on CPU is :class:`kvplug.index.local_mass.LocalMass`. Windows are added one by one in the
order in which they are listed, by one program a KV head, so that sums have one order; a window of a
request and one of another that has the same page count in the order of their positions, and a page
takes a window that begins before ``seen`` not at all: that one gave before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices, check_page, require
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.local_mass import LocalWindows

BLOCK_C = 4096
"""Slots that a program adds to in a step. Like what follows not measured: no GPU was at hand."""
BLOCK_S = 256
"""Slots that a program forgets."""


@triton.jit
def _collect_kernel(  # type: ignore[no-untyped-def]
    p_count, p_table, p_request, p_end, p_page, p_given, p_mass, p_seen, table_stride, most_keys,
    windows, PAGE: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Adds what windows give to the pages of one KV head that have not got it yet, in order."""
    i_h, heads = tl.program_id(0), tl.num_programs(0)
    o_p, o_t = tl.arange(0, BLOCK_P), tl.arange(0, PAGE)
    for i_w in range(windows):
        end, first_page = tl.load(p_end + i_w), tl.load(p_page + i_w)
        first = end - tl.load(p_count + i_w)
        pages = tl.minimum(tl.cdiv(end, PAGE) - first_page, most_keys // PAGE)
        p_pages = p_table + tl.load(p_request + i_w).to(tl.int64) * table_stride + first_page
        p_window = p_given + (i_w * heads + i_h).to(tl.int64) * most_keys
        for n in range(0, pages, BLOCK_P):
            m_p = n + o_p < pages
            b_page = tl.load(p_pages + n + o_p, mask=m_p, other=0).to(tl.int64)
            o_row = b_page * heads + i_h  # [BP]
            m_p &= tl.load(p_seen + o_row, mask=m_p, other=0) <= first
            p_slots = p_mass + o_row[:, None] * PAGE + o_t[None, :]
            b_given = tl.load(p_window + (n + o_p)[:, None] * PAGE + o_t[None, :], m_p[:, None])
            b_mass = tl.load(p_slots, mask=m_p[:, None], other=0.0)  # [BP, P]
            tl.store(p_slots, b_mass + b_given, mask=m_p[:, None])
            tl.store(p_seen + o_row, tl.zeros([BLOCK_P], tl.int32) + end, mask=m_p)
        # The next window reads what this one wrote, with other threads.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["tokens"])
def _forget_kernel(  # type: ignore[no-untyped-def]
    p_slots, p_mass, p_seen, tokens, PAGE: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Clears BLOCK_S slots of one KV head."""
    i_h, heads = tl.program_id(1), tl.num_programs(1)
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    b_slot = tl.load(p_slots + o_s, mask=o_s < tokens, other=-1)  # [BS]
    m_s = b_slot >= 0
    b_slot = tl.where(m_s, b_slot, 0)
    o_row = b_slot // PAGE * heads + i_h
    tl.store(p_mass + o_row * PAGE + b_slot % PAGE, tl.zeros([BLOCK_S], tl.float32), mask=m_s)
    is_first = m_s & (b_slot % PAGE == 0)
    tl.store(p_seen + o_row, tl.zeros([BLOCK_S], tl.int32), mask=is_first)


def collect_mass(
    windows: LocalWindows, given: torch.Tensor, mass: torch.Tensor, seen: torch.Tensor
) -> None:
    """Adds what windows give to the slots of their local pages that have not got it yet.

    A page has got what a window gives if that begins before ``seen``, the end of the last one.

    Args:
        windows: The windows, in the order of their first positions.
        given: ``[W, Hk, K]`` float32 of :func:`kvplug.kernels.local_mass.local_mass`.
        mass: ``[pages, Hk, P]`` float32, added to.
        seen: ``[pages, Hk]`` int32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    _check_state(mass, seen)
    kv_heads, page = mass.shape[1:]
    num = windows.check(kv_heads)[0]
    check("given", given, (num, kv_heads, "K"), torch.float32)
    require(given.shape[2] % page == 0, f"K must be a multiple of {page}, not {given.shape[2]}.")
    check_devices(given=given, mass=mass, seen=seen, request=windows.request)
    if not given.numel():
        return
    _collect_kernel[(kv_heads,)](
        windows.queries.num_tokens, windows.block_table, windows.request, windows.context_end,
        windows.first_page, given, mass, seen, windows.block_table.stride(0), given.shape[2], num,
        PAGE=page, BLOCK_P=BLOCK_C // page,
    )  # fmt: skip


def _check_state(mass: torch.Tensor, seen: torch.Tensor) -> None:
    """Refuses what is not by page, KV head and slot."""
    check("mass", mass, ("pages", "Hk", "P"), torch.float32)
    check("seen", seen, mass.shape[:2], torch.int32)
    check_page(mass.shape[2])
    check_devices(mass=mass, seen=seen)


def collect_mass_reference(
    windows: LocalWindows, given: torch.Tensor, mass: torch.Tensor, seen: torch.Tensor
) -> None:
    """Twin of :func:`collect_mass` in plain torch."""
    page = mass.shape[2]
    for w in range(len(windows.request)):
        first, end, pages = windows.place(w, page)
        mine = given[w, :, : len(pages) * page].unflatten(1, (-1, page)).transpose(0, 1)
        fresh = seen[pages] <= first  # [n, Hk]
        mass[pages] = torch.where(fresh[:, :, None], mass[pages] + mine, mass[pages])
        seen[pages] = torch.where(fresh, end, seen[pages]).int()


def forget_mass(slots: torch.Tensor, mass: torch.Tensor, seen: torch.Tensor) -> None:
    """Forgets what slots held; a page whose first slot is written has seen no query.

    Args:
        slots: ``[T]`` int64, ``page * P + offset``; a negative one is padding.
        mass: ``[pages, Hk, P]`` float32, written.
        seen: ``[pages, Hk]`` int32, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    check("slots", slots, ("T",), torch.int64)
    _check_state(mass, seen)
    check_devices(slots=slots, mass=mass)
    if not len(slots):
        return
    _forget_kernel[(triton.cdiv(len(slots), BLOCK_S), mass.shape[1])](
        slots, mass, seen, len(slots), PAGE=mass.shape[2], BLOCK_S=BLOCK_S
    )


def forget_mass_reference(slots: torch.Tensor, mass: torch.Tensor, seen: torch.Tensor) -> None:
    """Twin of :func:`forget_mass` in plain torch."""
    page = mass.shape[2]
    known = slots[slots >= 0]
    mass[known // page, :, known % page] = 0
    seen[known[known % page == 0] // page] = 0


COMPILED = (
    *(
        Variant(
            _collect_kernel, "*i32 *i32 *i32 *i32 *i32 *fp32 *fp32 *i32 i32 i32 i32",
            {"PAGE": page, "BLOCK_P": BLOCK_C // page},
        )
        for page in (32, 128)
    ),
    Variant(_forget_kernel, "*i64 *fp32 *i32 i32", {"PAGE": 32, "BLOCK_S": BLOCK_S}),
)  # fmt: skip
"""For :mod:`kvplug.kernels.compile_check`."""
