"""What a turn lacks is listed once each, in the order in which its rows list it."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.find_slots import find_slots_reference
from kvplug.kernels.list_missing import BLOCK, list_missing, list_missing_reference
from tests.kernels.pools import (
    NOBODY,
    PAGE,
    assert_same,
    copy_of,
    empty_maps,
    lists_for,
    place,
    random_rows,
    rows_of,
)


@pytest.mark.parametrize(
    ("windows", "heads", "most", "pages"),
    [(1, 1, 1, 3), (2, 3, 9, 40), (10, 2, 150, 300)],
    ids=str,
)
def test_twin(windows: int, heads: int, most: int, pages: int, device: str) -> None:
    """The last has more places than the program looks at in a step."""
    maps = empty_maps(pages, heads, pages * heads, device)
    for _ in range(3):
        rows = random_rows(windows * heads, most, pages, device)
        found, expected = copy_of(maps), copy_of(maps)
        lists, theirs = lists_for(pages * heads, device), lists_for(pages * heads, device)
        for mine, (entries, missing), kernel in (
            (found, lists, list_missing), (expected, theirs, list_missing_reference),
        ):  # fmt: skip
            find_slots_reference(rows, PAGE, mine)
            kernel(rows, PAGE, mine, entries, missing)
        assert_same(found, expected)
        assert all(map(torch.equal, lists, theirs))
        place(rows, maps)
    assert windows < 10 or rows.table.numel() > BLOCK


def test_each_once_in_the_order_of_the_rows(device: str) -> None:
    maps = empty_maps(9, 2, 8, device)
    place(rows_of([[4, 3], []], device), maps)
    misses = int(maps.counts[1])
    rows = rows_of([[8, 7, 3], [0], [8, 2, 7], [8, 0]], device)
    find_slots_reference(rows, PAGE, maps)
    entries, missing = lists_for(5, device)
    list_missing(rows, PAGE, maps, entries, missing)
    assert entries[:, :2].tolist() == [[8, 0], [7, 0], [0, 1], [2, 0], [8, 1]]
    assert (entries[:, 2] == NOBODY).all()
    assert missing.tolist() == [5]
    assert maps.lacking.tolist() == [0]
    assert int(maps.counts[1]) == misses + 5


def test_nothing_is_listed_where_nothing_is_lacking(device: str) -> None:
    """Claims that were left behind would be seen: nothing is looked at."""
    maps, rows = empty_maps(3, 1, 3, device), rows_of([[2, 0, 1]], device)
    place(rows, maps)
    entries, missing = lists_for(3, device)
    find_slots_reference(rows, PAGE, maps)
    before = copy_of(maps)
    list_missing(rows, PAGE, maps, entries, missing)
    assert missing.tolist() == [0]
    assert (entries == NOBODY).all()
    assert_same(maps, before)


def test_what_cannot_be_listed_is_refused(device: str) -> None:
    maps, rows = empty_maps(4, 2, 3, device), rows_of([[1], [2]], device)
    entries, missing = lists_for(3, device)
    with pytest.raises(ValueError, match=r"entries must be int32 \[m, 3\]"):
        list_missing(rows, PAGE, maps, entries[:, :2], missing)
    with pytest.raises(ValueError, match=r"missing must be int32 \[1\]"):
        list_missing(rows, PAGE, maps, entries, missing.long())
