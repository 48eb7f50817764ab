"""Where requests keep what they carry: every window finds what the one before it left."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.carry import NOWHERE, carried


class Chain:
    """A request whose every window leaves its number on its pages."""

    def __init__(self, window: int, page: int) -> None:
        self.window, self.page = window, page
        self.kept: dict[int, int] = {}
        self.length = 0
        self.windows = 0

    def next(self, tokens: int, prefilling: bool) -> None:
        """A window; a prompt's leaves a new number, a decoded token what it found."""
        first, end = self.length, self.length + tokens
        before, here, also = carried(first, end, prefilling, self.window, self.page)
        assert (before == NOWHERE) == (first == 0)
        if first > 0 and here != NOWHERE:
            assert self.kept[before] == self.windows
        if prefilling:
            self.windows += 1
            assert here != NOWHERE
        if here != NOWHERE:
            # Written pages exist by now, and are the window's own.
            for place in (here, also):
                assert first // self.window == place * self.page // self.window
                assert place * self.page < end
                self.kept[place] = self.windows
        self.length = end
        opening = (end - 1) // self.window * self.window // self.page
        if not prefilling or end % self.window:
            assert self.kept[opening] == self.windows, "where decoded tokens look"


@given(st.sampled_from([(1, 1), (4, 4), (4, 2), (12, 3), (16, 4)]), st.data())
@settings(max_examples=200, deadline=None)
def test_every_window_finds_what_the_one_before_it_left(
    sizes: tuple[int, int], data: st.DataObject
) -> None:
    """Over turns: a prompt in windows, decoded tokens up to a whole window, and so on."""
    window, page = sizes
    chain = Chain(window, page)
    for _ in range(data.draw(st.integers(1, 3))):
        for _ in range(data.draw(st.integers(0, 2))):
            chain.next(window, True)
        chain.next(data.draw(st.integers(1, window)), True)
        for _ in range(data.draw(st.integers(0, 3)) * window - chain.length % window):
            chain.next(1, False)
        while chain.length % window:  # the next turn's hit ends at a whole window
            chain.next(1, False)


@pytest.mark.parametrize(
    ("first", "end", "prefilling", "expected"),
    [
        pytest.param(0, 16, True, (NOWHERE, 3, 3), id="a request's first window"),
        pytest.param(16, 32, True, (3, 7, 7), id="a whole window"),
        pytest.param(32, 37, True, (7, 8, 8), id="unfinished"),
        pytest.param(32, 47, True, (7, 8, 11), id="unfinished, on its last page"),
        pytest.param(32, 33, False, (7, 8, 8), id="decoding begins a window"),
        pytest.param(37, 38, False, (8, NOWHERE, NOWHERE), id="decoding in a window"),
        pytest.param(44, 45, False, (8, 11, 11), id="decoding begins a window's last page"),
        pytest.param(47, 48, False, (8, NOWHERE, NOWHERE), id="decoding ends a window"),
    ],
)
def test_by_hand(first: int, end: int, prefilling: bool, expected: tuple[int, int, int]) -> None:
    """Windows of 16 tokens, pages of 4."""
    assert carried(first, end, prefilling, 16, 4) == expected
