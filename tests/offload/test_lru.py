"""Which page gives way: compiled code against plain Python, by last use and by attention mass."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.offload.lru import STEP, Slots
from kvplug.offload.mass import weigh_rows
from kvplug.offload.place import find_rows, place_rows

PAGE = 32


def placed(
    state: Slots, table: np.ndarray, lengths: np.ndarray, out: np.ndarray
) -> tuple[int, int, int, int]:
    """One step of one KV head, as a pool takes it."""
    size = len(state.entry_in)
    lacking, found = find_rows(state, table, lengths, PAGE, out)
    if not lacking:
        return len(table), 0, found, 0
    buffers = np.empty(size, np.int32), np.empty(size, np.int32)
    last, missing, pinned, evicted = place_rows(
        state, table, lengths, PAGE, 0, 1, lacking, out, *buffers
    )
    return last, missing, pinned, evicted


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=5), min_size=1, max_size=30),
    slots=st.integers(5, 12),
)
def test_slots_follow_a_plain_list(rows: list[list[int]], slots: int) -> None:
    """The clock against Python's own list: same hits, same evictions, newest first."""
    state, order = Slots.empty(20, slots), list[int]()
    for row in rows:
        table, out = np.array([row], np.int32), np.zeros((1, len(row)), np.int32)
        lengths = np.array([len(row) * PAGE], np.int32)
        last, missing, pinned, evicted = placed(state, table, lengths, out)
        fresh = list(dict.fromkeys(row))
        assert (last, pinned) == (1, len(fresh))
        assert missing == sum(entry not in order for entry in fresh)
        kept = [entry for entry in order if entry not in fresh]
        gone = max(len(kept) + len(fresh) - slots, 0)
        order = kept[gone:] + fresh
        assert evicted == gone
        assert set(state.entry_in[state.entry_in >= 0]) == set(order)
        assert [state.entry_in[slot] for slot in out[0]] == row
        state.check()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=5), min_size=1, max_size=30),
    slots=st.integers(5, 12),
    seed=st.integers(0, 999),
)
def test_masses_follow_the_formula(rows: list[list[int]], slots: int, seed: int) -> None:
    """LRU-S as its authors write it: times 0.1, plus mass; the smallest not in use gives way."""
    state, stamps = Slots.empty(20, slots, by_mass=True), dict[int, float]()
    draw = np.random.default_rng(seed)
    for row in rows:
        table, out = np.array([row], np.int32), np.zeros((1, len(row)), np.int32)
        lengths = np.array([len(row) * PAGE], np.int32)
        shares = draw.uniform(1e-4, 1, (1, len(row))).astype(np.float32)
        state.marks[STEP] += 1
        placed(state, table, lengths, out)
        weigh_rows(state, out, shares, lengths, PAGE)
        for entry in row:
            while entry not in stamps and len(stamps) >= slots:
                del stamps[min((stamps[e], e) for e in stamps if e not in row)[1]]
            stamps.setdefault(entry, 0.0)
        stamps = {entry: stamp * 0.1 for entry, stamp in stamps.items()}
        for entry, share in zip(row, shares[0].tolist(), strict=True):
            stamps[entry] += share
        assert set(state.entry_in[state.entry_in >= 0]) == set(stamps)
        now = 10.0 ** (state.mass - state.marks[STEP])
        for entry, stamp in stamps.items():
            assert np.isclose(now[state.slot_of[entry]], stamp, rtol=1e-6)
        state.check()


def test_a_page_of_little_mass_goes_before_an_older_one_of_much() -> None:
    state, shares = Slots.empty(20, 2, by_mass=True), {0: 1.0, 1: 1e-6, 2: 0.5}
    out, lengths = np.zeros((1, 1), np.int32), np.array([PAGE], np.int32)
    for entry in (0, 1, 2):
        state.marks[STEP] += 1
        placed(state, np.array([[entry]], np.int32), lengths, out)
        weigh_rows(state, out, np.array([[shares[entry]]], np.float32), lengths, PAGE)
    assert set(state.entry_in) == {0, 2}


def test_what_a_later_window_needs_gives_way_last() -> None:
    """Two windows that do not fit together: the second one's page outlives others of more mass."""
    state = Slots.empty(20, 3, by_mass=True)
    out, lengths = np.zeros((1, 1), np.int32), np.array([PAGE], np.int32)
    for entry, share in ((0, 1.0), (1, 1e-9), (2, 1.0)):
        placed(state, np.array([[entry]], np.int32), lengths, out)
        weigh_rows(state, out, np.array([[share]], np.float32), lengths, PAGE)
    placed(
        state,
        np.array([[5], [1]], np.int32),
        np.array([PAGE, PAGE], np.int32),
        np.zeros((2, 1), np.int32),
    )
    assert 1 in state.entry_in
