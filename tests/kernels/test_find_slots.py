"""Slots of what a turn lists are stamped, and what the pool lacks is claimed by its first place."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.find_slots import find_slots, find_slots_reference
from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.slot_maps import CLAIMED
from tests.kernels.pools import (
    PAGE,
    assert_same,
    copy_of,
    empty_maps,
    place,
    random_rows,
    rows_of,
)


@pytest.mark.parametrize(
    ("windows", "heads", "most", "pages"),
    [(1, 1, 1, 3), (2, 3, 9, 40), (5, 2, 150, 300), (3, 1, 130, 131)],
    ids=str,
)
def test_twin(windows: int, heads: int, most: int, pages: int, device: str) -> None:
    """In an empty pool, then in one that holds part of what is listed."""
    maps = empty_maps(pages, heads, pages * heads, device)
    for _ in range(3):
        rows = random_rows(windows * heads, most, pages, device)
        found, expected = copy_of(maps), copy_of(maps)
        find_slots(rows, PAGE, found)
        find_slots_reference(rows, PAGE, expected)
        assert_same(found, expected)
        place(rows, maps)


def test_what_is_listed_twice_is_counted_and_claimed_once(device: str) -> None:
    """Two heads, whose pages of one number are different entries; the second row lists nothing."""
    maps = empty_maps(9, 2, 5, device)
    place(rows_of([[4, 3], []], device), maps)
    hits, misses, evictions = maps.counts.tolist()
    rows = rows_of([[3, 7, 8], [], [8, 4, 3], [8]], device)  # four places each
    find_slots(rows, PAGE, maps)
    assert maps.counts.tolist() == [hits + 2, misses, evictions]  # 3 and 4 of head 0
    assert int(maps.lacking) == 4  # 7, 8, 8 of head 0 and 8 of head 1
    claims = {(7, 0): 1, (8, 0): 2, (8, 1): 12}
    for entry, first in claims.items():
        assert int(maps.slot_of[entry]) == CLAIMED.value + first
    assert int((maps.slot_of < -1).sum()) == len(claims)
    assert sorted(maps.used.tolist()) == [0, 0, 0, 4, 4]


def test_rows_without_places(device: str) -> None:
    maps = empty_maps(3, 1, 2, device)
    before = copy_of(maps)
    for table in (torch.zeros(0, 4), torch.zeros(3, 0)):
        lengths = torch.zeros(len(table), dtype=torch.int32, device=device)
        find_slots(PageRows(table.int().to(device), lengths), PAGE, maps)
    assert_same(maps, before)


def test_what_cannot_be_looked_up_is_refused(device: str) -> None:
    maps, rows = empty_maps(4, 2, 3, device), rows_of([[1], [2]], device)
    odd = PageRows(rows.table[:1], rows.lengths[:1])
    with pytest.raises(ValueError, match=r"table must be int32 \[0, W\]"):
        find_slots(odd, PAGE, maps)
    with pytest.raises(ValueError, match="Page size must be one of"):
        find_slots(rows, 24, maps)
    with pytest.raises(ValueError, match=r"slot_of must be int32 \[pages, Hk\]"):
        find_slots(rows, PAGE, maps._replace(slot_of=maps.slot_of.long()))
    with pytest.raises(ValueError, match=r"used must be int64 \[3\]"):
        find_slots(rows, PAGE, maps._replace(used=maps.used[:2]))
    with pytest.raises(ValueError, match=r"clock must be int64 \[1\]"):
        find_slots(rows, PAGE, maps._replace(clock=maps.clock.int()))
