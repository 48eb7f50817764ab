"""Quantiles are those of the definition, and requests are what is resampled."""

from __future__ import annotations

import pytest

from kvplug.loadtests.intervals import quantiles


def test_quantiles_of_hand_made_values() -> None:
    groups = [[float(i)] for i in range(20, 0, -1)]
    found = quantiles(groups, [0.05, 0.5, 0.95, 0.951, 1.0])
    assert [interval.value for interval in found] == [1, 10, 19, 20, 20]
    assert all(i.low <= i.value <= i.high for i in found)


def test_rounding_takes_no_value_more() -> None:
    """0.07 x 100 is a hair above 7."""
    assert quantiles([[float(i)] for i in range(1, 101)], [0.07])[0].value == 7


def test_all_values_of_a_request_count() -> None:
    groups = [[1.0, 1.0, 1.0, 1.0], [], [9.0]]
    (found,) = quantiles(groups, [0.8])
    assert found.value == 1
    (found,) = quantiles(groups, [0.81])
    assert found.value == 9


def test_requests_are_resampled_whole() -> None:
    """A hundred equal values of one request are one observation: the interval is as wide."""
    few = quantiles([[1.0], [2.0], [3.0], [4.0]], [0.5])
    many = quantiles([[float(i)] * 100 for i in (1, 2, 3, 4)], [0.5])
    assert few == many
    assert many[0].low == 1
    assert many[0].high == 4


def test_the_interval_covers_as_often_as_it_says() -> None:
    import numpy as np

    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        (found,) = quantiles(draw.exponential(1, (40, 1)).tolist(), [0.5])
        hits += found.low <= float(np.log(2)) <= found.high
    # 95 of 100 are expected; five standard deviations of a binomial count below.
    assert hits >= 95 - 5 * (100 * 0.95 * 0.05) ** 0.5


def test_nothing_has_no_quantiles() -> None:
    assert quantiles([], [0.5]) == []
    assert quantiles([[], []], [0.5]) == []


def test_one_request_is_certain() -> None:
    assert tuple(quantiles([[3.0]], [0.5])[0]) == pytest.approx((3, 3, 3))
