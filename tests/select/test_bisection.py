"""Selection by bisection: orders are those of the floats, thresholds count what reaches them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.select.bisection import ZERO, put_in_order, take_best, threshold_of

NAN, INF = math.nan, math.inf


def orders_of(scores: list[float]) -> np.ndarray:
    bits = np.array(scores, np.float32).view(np.uint32)
    put_in_order(bits)
    return bits


def test_orders_rise_with_the_numbers() -> None:
    rising = [-3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 1.0000001, 3e38]
    assert (np.diff(orders_of(rising).astype(np.int64)) > 0).all()
    assert orders_of([NAN, -NAN, INF, -INF]).tolist() == [0] * 4
    assert orders_of([0.0, -0.0]).tolist() == [ZERO] * 2
    assert orders_of([-3e38]) > 0


@given(
    st.lists(st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)), min_size=1, max_size=60),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_the_threshold_is_reached_by_as_many_as_it_says(
    values: list[int], data: st.DataObject
) -> None:
    wanted = data.draw(st.integers(1, len(values)))
    orders = np.array(values, np.uint32)
    threshold, too_many = threshold_of(orders, wanted)
    assert (orders >= threshold).sum() == wanted + too_many
    assert too_many == 0 or (orders == threshold).sum() > too_many
    out = np.full(wanted, -9, np.int32)
    take_best(orders, wanted, 7, out)
    best = sorted(range(len(values)), key=lambda n: (-values[n], -n))[:wanted]
    assert out.tolist() == [7 + n for n in sorted(best)]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 4096])
def test_all_are_wanted(count: int) -> None:
    out = np.empty(count, np.int32)
    take_best(np.zeros(count, np.uint32), count, 0, out)
    assert out.tolist() == list(range(count))
