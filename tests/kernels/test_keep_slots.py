"""What later turns need is the last to give way, and gives way where there is nothing else."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.keep_slots import keep_slots, keep_slots_reference
from kvplug.kernels.page_rows import PageRows
from tests.kernels.pools import (
    OURS,
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
    [(1, 1, 1, 3), (2, 3, 9, 40), (3, 2, 150, 300)],
    ids=str,
)
def test_twin(windows: int, heads: int, most: int, pages: int, device: str) -> None:
    """Of rows that the pool holds part of."""
    maps = empty_maps(pages, heads, pages * heads, device)
    place(random_rows(windows * heads, most, pages, device), maps)
    rows = random_rows(windows * heads, most, pages, device)
    found, expected = copy_of(maps), copy_of(maps)
    keep_slots(rows, PAGE, found)
    keep_slots_reference(rows, PAGE, expected)
    assert_same(found, expected)


def test_what_follows_gives_way_last(device: str) -> None:
    """Pages 0 and 1 were used longest ago; without notice they would go first."""
    maps = empty_maps(12, 1, 6, device)
    for pages in ([0, 1], [2, 3], [4, 5]):
        place(rows_of([pages], device), maps, OURS)
    keep_slots(rows_of([[0, 9, 1]], device), PAGE, maps)
    place(rows_of([[6, 7, 8]], device), maps, OURS)
    held = set(maps.entry_in.tolist())
    assert {0, 1, 6, 7, 8} < held
    assert len(held & {4, 5}) == 1  # 2 and 3 went before
    keep_slots(rows_of([[0, 9, 1]], device), PAGE, maps)
    place(rows_of([[2, 3, 4, 5, 10]], device), maps, OURS)
    assert {2, 3, 4, 5, 10} < set(maps.entry_in.tolist())


def test_nothing_follows(device: str) -> None:
    maps = empty_maps(3, 1, 2, device)
    before = copy_of(maps)
    none = torch.zeros(0, 4, dtype=torch.int32, device=device)
    keep_slots(PageRows(none, none[:, 0].contiguous()), PAGE, maps)
    assert_same(maps, before)
    with pytest.raises(ValueError, match="Page size must be one of"):
        keep_slots(rows_of([[1]], device), 24, maps)
