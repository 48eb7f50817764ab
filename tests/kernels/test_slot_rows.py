"""Rows name the slots of their pages, each row those of its head."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.slot_rows import slot_rows, slot_rows_reference
from tests.kernels.pools import PAGE, empty_maps, place, random_rows, rows_of


@pytest.mark.parametrize(
    ("windows", "heads", "most", "pages"),
    [(1, 1, 1, 3), (2, 3, 9, 40), (3, 2, 150, 300)],
    ids=str,
)
def test_twin(windows: int, heads: int, most: int, pages: int, device: str) -> None:
    maps = empty_maps(pages, heads, pages * heads, device)
    rows = random_rows(windows * heads, most, pages, device)
    place(rows, maps)
    found, expected = (torch.full_like(rows.table, -7) for _ in range(2))
    slot_rows(rows, PAGE, maps, found)
    slot_rows_reference(rows, PAGE, maps, expected)
    assert torch.equal(found, expected)


def test_pages_and_what_is_behind_them(device: str) -> None:
    """A slot is there for all of it; a row may be full, or empty."""
    maps = empty_maps(9, 2, 9, device)
    rows = rows_of([[4, 3, 8], [3], [8, 4, 0], []], device, width=3)
    place(rows, maps)
    slots = torch.full_like(rows.table, -7)
    slot_rows(rows, PAGE, maps, slots)
    for row, pages in enumerate([[4, 3, 8], [3], [8, 4, 0], []]):
        entries = maps.entry_in[slots[row, : len(pages)].long()].tolist()
        assert entries == [page * 2 + row % 2 for page in pages]
        assert (slots[row, len(pages) :] == 0).all()


def test_what_cannot_be_written_is_refused(device: str) -> None:
    maps, rows = empty_maps(4, 2, 3, device), rows_of([[1], [2]], device)
    with pytest.raises(ValueError, match=r"slots must be int32 \[2, 2\]"):
        slot_rows(rows, PAGE, maps, rows.table[:, :1])
