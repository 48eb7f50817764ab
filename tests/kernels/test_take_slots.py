"""Slots that were used longest ago give way, those of the turn never, always in the same way."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.take_slots import take_slots, take_slots_reference
from tests.kernels.pools import (
    NOBODY,
    OURS,
    PAGE,
    assert_same,
    assert_sound,
    copy_of,
    empty_maps,
    lists_for,
    place,
    random_rows,
    rows_of,
)


@pytest.mark.parametrize(
    ("windows", "heads", "most", "pages", "slots"),
    [
        (1, 1, 1, 3, 1),
        (2, 3, 9, 40, 41),
        (3, 1, 30, 90, 60),
        (4, 2, 150, 1300, 2500),  # more slots than the program looks at in a step
    ],
    ids=str,
)
def test_turns_one_after_the_other(
    windows: int, heads: int, most: int, pages: int, slots: int, device: str
) -> None:
    """By kernels and by twins; what is listed has a slot, and what gave way is as old as any."""
    found, expected = (empty_maps(pages, heads, slots, device) for _ in range(2))
    for _ in range(6):
        rows = random_rows(windows * heads, most, pages, device)
        before = copy_of(expected)
        mine, theirs = place(rows, found, OURS), place(rows, expected)
        assert_same(found, expected)
        assert all(map(torch.equal, mine, theirs))
        assert_sound(found)
        listed = found.entries_of(rows, PAGE)
        assert all(int(found.slot_of[number, head]) >= 0 for _, number, head in listed)
        taken = mine[0][: int(mine[1]), 2].long()
        others = torch.ones(slots, dtype=torch.bool, device=device)
        others[taken] = False
        others &= found.used <= int(before.clock)
        if len(taken) and others.any():
            assert int(before.used[taken].max()) <= int(before.used[others].min())


def test_everything_is_missing_and_fits_just_so(device: str) -> None:
    """Three turns of a pool as large as each: every slot gives way in the second and third."""
    heads, pages = 2, 24
    maps = empty_maps(pages, heads, 16, device)
    before = maps.counts.tolist()
    for turn in range(3):
        first = list(range(8 * turn, 8 * turn + 8))
        rows = rows_of([first, first[::-1]], device)
        entries, missing = place(rows, maps, OURS)
        assert int(missing) == 16
        assert sorted(entries[:, 2].tolist()) == list(range(16))
        assert_sound(maps)
        assert maps.used.tolist() == [2 * turn + 2] * 16
    assert (maps.counts - torch.tensor(before, device=device)).tolist() == [0, 48, 32]


def test_the_oldest_give_way_and_empty_ones_first(device: str) -> None:
    maps = empty_maps(12, 1, 6, device)
    for pages in ([0, 1], [2, 3], [0]):  # 1 was used longest ago; two slots are empty
        place(rows_of([pages], device), maps, OURS)
    evictions = int(maps.counts[2])
    place(rows_of([[5, 6, 2]], device), maps, OURS)  # 2 is stamped, nothing gives way
    assert int(maps.counts[2]) == evictions
    for page, gone in ((7, 1), (8, 3), (9, 0)):
        assert int(maps.slot_of[gone, 0]) >= 0
        place(rows_of([[page]], device), maps, OURS)
        assert int(maps.slot_of[gone, 0]) == -1
    assert sorted(maps.entry_in.tolist()) == [2, 5, 6, 7, 8, 9]
    assert int(maps.counts[2]) == evictions + 3


def test_ages_have_no_end(device: str) -> None:
    """Slots that were used longer ago than 32 bits can count give way like each other."""
    maps = empty_maps(9, 1, 4, device)
    place(rows_of([[0, 1, 2, 3]], device), maps)
    maps.used.copy_(torch.tensor([1, 2**40, 2**41 - 3, 1], device=device))
    maps.clock.fill_(2**41)
    expected = copy_of(maps)
    entries, missing = place(rows_of([[7, 8, 6]], device), maps, OURS)
    place(rows_of([[7, 8, 6]], device), expected)
    assert_same(maps, expected)
    assert entries[:3, 2].tolist() == [0, 1, 3]
    assert int(missing) == 3
    assert int(maps.clock) == 2**41 + 2


def test_without_anything_missing_only_time_passes(device: str) -> None:
    maps = empty_maps(3, 1, 2, device)
    place(rows_of([[2]], device), maps)
    entries, missing = lists_for(2, device)
    missing.zero_()
    expected = copy_of(maps)
    take_slots(entries, missing, maps)
    assert (entries == NOBODY).all()
    expected.clock.add_(2)
    assert_same(maps, expected)


def test_what_cannot_be_taken_is_refused(device: str) -> None:
    maps = empty_maps(4, 2, 3, device)
    entries, missing = lists_for(3, device)
    with pytest.raises(ValueError, match=r"entries must be int32 \[m, 3\]"):
        take_slots(entries.long(), missing, maps)
    with pytest.raises(ValueError, match=r"missing must be int32 \[1\]"):
        take_slots(entries, missing[:0], maps)
    with pytest.raises(ValueError, match=r"counts must be int64 \[3\]"):
        take_slots(entries, missing, maps._replace(counts=maps.counts[:2]))
    missing.fill_(4)
    with pytest.raises(AssertionError, match="more slots than there are"):
        take_slots_reference(entries, missing, maps)
