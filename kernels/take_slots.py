"""Takes slots for listed entries: those that were used longest ago, and never in this turn.

The twin on CPU is ``take`` of :mod:`kvplug.offload.lru`, which tells uses of one turn apart too;
here, of slots with the same stamp, the last ones are taken. The age from which
slots are taken is found by radix selection, a digit of 8 bits a pass, as :mod:`.top_pages` finds
scores. Entries and slots are paired in their orders, so the same steps give the same slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvplug.kernels.checks import check, check_devices
from kvplug.kernels.compile_check import Variant
from kvplug.kernels.slot_maps import EVICTIONS, NOWHERE, SlotMaps
from kvplug.kernels.top_pages import is_wanted

BLOCK = 2048
"""Slots that the program looks at in a step. Not measured: no GPU was at hand."""
OLDEST = tl.constexpr(2**31 - 1)
"""Age from which on all are alike."""


@triton.jit
def _ages(p_used, o_slot, num_slots, now):  # type: ignore[no-untyped-def]
    """How long ago slots were used, uint32, and which of them may be taken."""
    m_slot = o_slot < num_slots
    b_age = now - tl.load(p_used + o_slot, mask=m_slot, other=now)
    return tl.minimum(b_age, OLDEST).to(tl.uint32), m_slot & (b_age > 0)


@triton.jit
def _take_slots_kernel(  # type: ignore[no-untyped-def]
    p_entries, p_missing, p_slot_of, p_entry_in, p_used, p_clock, p_counts, num_slots, heads,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All entries and slots."""
    missing, now = tl.load(p_missing), tl.load(p_clock) + 1
    if missing > 0:
        o_bin = tl.arange(0, 256)
        threshold = tl.full([], 0, tl.uint32)
        remaining, skip = missing, missing * 0
        for i in range(4):
            shift = 24 - 8 * i
            b_counts = tl.zeros([256], dtype=tl.int32)
            for slot in range(0, num_slots, BLOCK_N):
                b_age, m_slot = _ages(p_used, slot + tl.arange(0, BLOCK_N), num_slots, now)
                m_slot &= ((b_age ^ threshold) >> 8) >> shift == 0
                b_digit = ((b_age >> shift) & 255).to(tl.int32)
                b_counts += tl.histogram(b_digit, 256, mask=m_slot)
            b_reach = tl.sum(b_counts, 0) - tl.cumsum(b_counts, 0) + b_counts  # a digit or more
            digit = tl.sum((b_reach >= remaining).to(tl.int32), 0) - 1
            equal = tl.sum(tl.where(o_bin == digit, b_counts, 0), 0)
            remaining -= tl.sum(tl.where(o_bin == digit, b_reach, 0), 0) - equal
            skip = equal - remaining
            threshold |= digit.to(tl.uint32) << shift
        taken, seen, evicted = missing * 0, missing * 0, missing * 0
        for slot in range(0, num_slots, BLOCK_N):
            o_slot = slot + tl.arange(0, BLOCK_N)
            b_age, m_slot = _ages(p_used, o_slot, num_slots, now)
            m_take, seen = is_wanted(b_age, m_slot, threshold, skip, seen)
            b_take = m_take.to(tl.int32)
            p_entry = p_entries + (taken + tl.cumsum(b_take, 0) - 1) * 3
            taken += tl.sum(b_take, 0)
            b_page = tl.load(p_entry, mask=m_take, other=0).to(tl.int64)
            b_entry = b_page * heads + tl.load(p_entry + 1, mask=m_take, other=0)
            b_old = tl.load(p_entry_in + o_slot, mask=m_take, other=NOWHERE)
            m_old = m_take & (b_old >= 0)
            evicted += tl.sum(m_old.to(tl.int32), 0)
            tl.store(p_slot_of + b_old, NOWHERE, mask=m_old)
            tl.store(p_slot_of + b_entry, o_slot, mask=m_take)
            tl.store(p_entry_in + o_slot, b_entry.to(tl.int32), mask=m_take)
            tl.store(p_used + o_slot, tl.zeros([BLOCK_N], tl.int64) + now, mask=m_take)
            tl.store(p_entry + 2, o_slot, mask=m_take)
        tl.store(p_counts + EVICTIONS, tl.load(p_counts + EVICTIONS) + evicted)
    tl.store(p_clock, now + 1)


def take_slots(entries: torch.Tensor, missing: torch.Tensor, maps: SlotMaps) -> None:
    """Gives each listed entry a slot, and ends the turn.

    Args:
        entries: ``[m, 3]`` int32 page and head, of which the slot is written.
        missing: ``[1]`` int32 how many count: no more than slots that the turn has not used.
        maps: Of the pool, written.

    Raises:
        ValueError: A tensor is of another shape, dtype, layout or device.
    """
    maps.check()
    check("entries", entries, ("m", 3), torch.int32)
    check("missing", missing, (1,), torch.int32)
    check_devices(slot_of=maps.slot_of, entries=entries, missing=missing)
    _take_slots_kernel[(1,)](
        entries, missing, maps.slot_of, maps.entry_in, maps.used, maps.clock, maps.counts,
        len(maps.entry_in), maps.slot_of.shape[1], BLOCK_N=BLOCK, num_warps=8,
    )  # fmt: skip


def take_slots_reference(entries: torch.Tensor, missing: torch.Tensor, maps: SlotMaps) -> None:
    """Twin of :func:`take_slots` in plain torch."""
    heads, count, now = maps.slot_of.shape[1], int(missing), int(maps.clock) + 1
    ages = (now - maps.used).clamp(max=OLDEST.value).tolist()
    assert sum(age > 0 for age in ages) >= count, "the turn needs more slots than there are"
    order = sorted(range(len(ages)), key=lambda slot: (ages[slot], slot), reverse=True)
    for i, slot in enumerate(sorted(order[:count])):
        number, head = entries[i, :2].tolist()
        old = int(maps.entry_in[slot])
        if old != NOWHERE.value:
            maps.slot_of[old // heads, old % heads] = NOWHERE.value
            maps.counts[EVICTIONS.value] += 1
        maps.slot_of[number, head], maps.entry_in[slot] = slot, number * heads + head
        maps.used[slot], entries[i, 2] = now, slot
    maps.clock.fill_(now + 1)


COMPILED = (
    Variant(
        _take_slots_kernel,
        "*i32 *i32 *i32 *i32 *i64 *i64 *i64 i32 i32",
        {"BLOCK_N": BLOCK},
        num_warps=8,
    ),
)
"""For :mod:`kvplug.kernels.compile_check`."""
