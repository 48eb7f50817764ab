"""Hot pools made by hand: rows that list pages, and maps of what was placed before."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from kvplug.kernels.find_slots import find_slots, find_slots_reference
from kvplug.kernels.list_missing import list_missing, list_missing_reference
from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.slot_maps import SlotMaps
from kvplug.kernels.take_slots import take_slots, take_slots_reference

NOBODY = 2**30
"""What an entry behind a row's pages names; to look it up would be to read out of bounds."""
PAGE = 16


class Kernels(NamedTuple):
    """What places a turn."""

    find: Callable[..., None]
    missing: Callable[..., None]
    take: Callable[..., None]


OURS = Kernels(find_slots, list_missing, take_slots)
TWINS = Kernels(find_slots_reference, list_missing_reference, take_slots_reference)


def rows_of(listed: list[list[int]], device: str, width: int | None = None) -> PageRows:
    """Rows of these pages, each but the first with a last page that is not full."""
    width = max(map(len, listed)) + 1 if width is None else width
    table = torch.full((len(listed), width), NOBODY, dtype=torch.int32)
    lengths = torch.zeros(len(listed), dtype=torch.int32)
    for row, pages in enumerate(listed):
        table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        lengths[row] = max(len(pages) * PAGE - row % PAGE, 0)
    return PageRows(table.to(device), lengths.to(device))


def random_rows(num: int, most: int, pages: int, device: str) -> PageRows:
    """Rows of up to so many pages in any order, none twice in a row."""
    listed = [torch.randperm(pages)[: 1 + (7 * row) % most].tolist() for row in range(num)]
    return rows_of(listed, device)


def empty_maps(pages: int, heads: int, slots: int, device: str) -> SlotMaps:
    """Of a pool with nothing in it, which has counted before."""
    return SlotMaps.empty(
        pages, heads, slots, torch.tensor([5, 6, 7], dtype=torch.int64, device=device)
    )


def copy_of(maps: SlotMaps) -> SlotMaps:
    """The same numbers elsewhere."""
    return SlotMaps(*(tensor.clone() for tensor in maps))


def lists_for(most: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries and how many count, of garbage."""
    entries = torch.full((most, 3), NOBODY, dtype=torch.int32, device=device)
    return entries, torch.full((1,), NOBODY, dtype=torch.int32, device=device)


def place(
    rows: PageRows, maps: SlotMaps, kernels: Kernels = TWINS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places a turn; its entries and how many count."""
    entries, missing = lists_for(len(maps.entry_in), rows.table.device.type)
    kernels.find(rows, PAGE, maps)
    kernels.missing(rows, PAGE, maps, entries, missing)
    kernels.take(entries, missing, maps)
    return entries, missing


def assert_same(found: SlotMaps, expected: SlotMaps) -> None:
    """To the bit."""
    for name, mine, theirs in zip(found._fields, found, expected, strict=True):
        assert torch.equal(mine, theirs), name


def assert_sound(maps: SlotMaps) -> None:
    """Maps agree, and nothing is claimed or lacking."""
    slot_of, entry_in = maps.slot_of.flatten(), maps.entry_in
    held = (entry_in >= 0).nonzero().flatten()
    assert torch.equal(slot_of[entry_in[held].long()].long(), held)
    assert int((slot_of >= 0).sum()) == len(held)
    assert int(slot_of.min()) >= -1
    assert int(entry_in.min()) >= -1
    assert ((maps.used > 0) == (entry_in >= 0)).all()
    assert int(maps.used.max()) < int(maps.clock)
    assert int(maps.lacking) == 0
