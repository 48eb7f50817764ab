"""The knee is the last load of an unbroken run of good ones."""

from __future__ import annotations

import pytest

from kvplug.loadtests.knee import Knee, Level, knee


def level(load: float, good: int, of: int = 100) -> Level:
    return Level(load, [True] * good + [False] * (of - good))


@pytest.mark.parametrize(
    ("goods", "load", "fails_at"),
    [
        ([100, 100, 95, 40], 4.0, 8.0),
        ([100, 94, 100, 100], 1.0, 2.0),
        ([100, 100, 100, 100], 8.0, None),
        ([10, 100, 100, 100], 0.0, 1.0),
    ],
)
def test_hand_made_sweeps(goods: list[int], load: float, fails_at: float | None) -> None:
    levels = [level(2.0**i, good) for i, good in enumerate(goods)]
    found = knee(levels, 0.95)
    assert (found.load, found.fails_at) == (load, fails_at)
    assert found.low <= found.load <= found.high


def test_the_interval_is_of_loads_that_were_tried() -> None:
    """Clear levels leave no doubt; 96 of 100 are below 95 in many resamples."""
    assert knee([level(1, 100), level(2, 0)], 0.95) == Knee(1, 1, 1, 2)
    found = knee([level(1, 100), level(2, 96), level(3, 0)], 0.95)
    assert (found.low, found.load, found.high) == (1, 2, 2)
