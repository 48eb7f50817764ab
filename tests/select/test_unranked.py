"""A row counts once, however many of its pages have no rank, and only for pages that are there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvplug.select.unranked import count_unranked

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("row", "counted"),
    [
        ([1.0, 2.0, 3.0], 0),
        ([NAN, 2.0, 3.0], 1),
        ([1.0, INF, NAN], 1),
        ([1.0, -INF, 3.0], 0),
        ([-INF] * 3, 1),
        ([-INF, -INF, 0.0], 0),
        ([1.0, 2.0, 3.0, NAN], 0),  # behind the last far page
        ([-NAN, 3e38, -3e38], 1),
    ],
)
def test_row(row: list[float], counted: int) -> None:
    scores = np.array([[row, [0.0] * len(row)]], np.float32)
    found = count_unranked(scores, np.array([1], np.int32), np.array([9, 4]), np.array([9, 7]))
    assert found == counted


def test_rows_add_up() -> None:
    scores = np.full((3, 2, 40), NAN, np.float32)
    scores[1] = 1.0
    rows = np.arange(3, dtype=np.int32)
    assert count_unranked(scores, rows, np.zeros(3, np.int32), np.full(3, 40, np.int32)) == 4
