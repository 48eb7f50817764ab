"""What the gate and the timer call of the hot pool; :mod:`kvplug.bench.kernel_cases` says more."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kvplug.bench.kernel_world import Case, Outputs, World, size_of
from kvplug.kernels.find_slots import find_slots, find_slots_reference
from kvplug.kernels.keep_slots import keep_slots, keep_slots_reference
from kvplug.kernels.list_missing import list_missing, list_missing_reference
from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.slot_maps import SlotMaps
from kvplug.kernels.slot_rows import slot_rows, slot_rows_reference
from kvplug.kernels.take_slots import take_slots, take_slots_reference
from kvplug.kernels.write_slots import write_slots, write_slots_reference


class Turn(NamedTuple):
    """Rows of decoded tokens that a pool is asked for, which holds part of them."""

    rows: PageRows
    maps: SlotMaps
    entries: torch.Tensor
    missing: torch.Tensor


def rows_of(world: World) -> PageRows:
    """Pages anywhere in the cache, as many as sinks, budget and local tokens take."""
    shape = world.shape
    width = -(-(shape.sink + shape.budget + shape.local) // shape.page) + 1
    width, count = min(width, world.num_pages), shape.batch * shape.kv_heads
    picked = world.words(count, world.num_pages).argsort(1)[:, :width]
    lengths = [(width - row % 3) * shape.page - row for row in range(count)]
    return PageRows(picked.int().contiguous(), world.column(lengths))


def turn_of(world: World, *, stages: int) -> Turn:
    """The second turn of a pool that holds no more than one, after its first ``stages``.

    Args:
        world: Of a shape.
        stages: How many of ``find_slots``, ``list_missing`` and ``take_slots`` are done.
    """
    shape = world.shape
    turns = [rows_of(world) for _ in range(2)]
    most = turns[0].table.numel()
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)
    maps = SlotMaps.empty(world.num_pages, shape.kv_heads, most, counts)
    entries = world.scratch(most, 3, dtype=torch.int32)
    missing = world.scratch(1, dtype=torch.int32)
    for rows, done in zip(turns, (3, stages), strict=True):
        if done > 0:
            find_slots_reference(rows, shape.page, maps)
        if done > 1:
            list_missing_reference(rows, shape.page, maps, entries, missing)
        if done > 2:
            take_slots_reference(entries, missing, maps)
    return Turn(turns[1], maps, entries, missing)


def found_slots(world: World) -> Case:
    """Slots of what rows list."""
    rows, maps, *_ = turn_of(world, stages=0)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(rows, world.shape.page, SlotMaps(*out))

    moved = 3 * size_of(rows.table)
    return Case("find_slots", find_slots, find_slots_reference, call, list(maps), moved)


def kept_slots(world: World) -> Case:
    """Slots of what rows list that follow."""
    rows, maps, *_ = turn_of(world, stages=0)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(rows, world.shape.page, maps._replace(used=out[0]))

    moved = 3 * size_of(rows.table)
    return Case("keep_slots", keep_slots, keep_slots_reference, call, [maps.used], moved)


def missing_entries(world: World) -> Case:
    """What a pool lacks of rows."""
    rows, maps, entries, missing = turn_of(world, stages=1)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(rows, world.shape.page, SlotMaps(*out[:-2]), *out[-2:])

    moved = 2 * size_of(rows.table) + size_of(entries)
    outputs = [*maps, entries, missing]
    return Case("list_missing", list_missing, list_missing_reference, call, outputs, moved)


def taken_slots(world: World) -> Case:
    """Slots for what a pool lacks."""
    _, maps, entries, missing = turn_of(world, stages=2)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(*out[-2:], SlotMaps(*out[:-2]))

    moved = 2 * size_of(maps.used, entries)
    outputs = [*maps, entries, missing]
    return Case("take_slots", take_slots, take_slots_reference, call, outputs, moved)


def rows_of_slots(world: World) -> Case:
    """Rows with slots for pages."""
    rows, maps, *_ = turn_of(world, stages=3)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(rows, world.shape.page, maps, *out)

    slots = world.scratch(*rows.table.shape, dtype=torch.int32)
    moved = 3 * size_of(slots)
    return Case("slot_rows", slot_rows, slot_rows_reference, call, [slots], moved)


def written_slots(world: World) -> Case:
    """New keys and values of a prompt, some of whose pages a pool holds."""
    shape, maps = world.shape, turn_of(world, stages=3).maps
    tokens = min(shape.tokens, shape.chunk)
    places = world.words(world.num_pages * shape.page).argsort()[:tokens]
    places[::97] = -1
    size = (tokens, shape.kv_heads, shape.dim)
    keys, values = (world.normal(*size, dtype=shape.dtype) for _ in range(2))
    pool = world.scratch(len(maps.used), 2, shape.page, shape.dim, dtype=shape.dtype)

    def call(function: Callable[..., None], out: Outputs) -> None:
        function(keys, values, places, maps, *out)

    moved = size_of(keys, values, places)
    return Case("write_slots", write_slots, write_slots_reference, call, [pool], moved)


POOL_CASES: tuple[Callable[[World], Case], ...] = (
    found_slots, kept_slots, missing_entries, taken_slots, rows_of_slots, written_slots,
)  # fmt: skip
"""Kernels that look after the hot pool."""
