"""Intervals against what is known of means and ratios."""

from __future__ import annotations

import math
import random

import pytest

from kvplug.evals.bootstrap import mean, ratio


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    draw = random.Random(1)
    scores = [float(draw.random() < 0.8) for _ in range(400)]
    found = mean(scores)
    share = sum(scores) / 400
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert found.value == pytest.approx(share)
    assert found.low == pytest.approx(share - half, abs=0.01)
    assert found.high == pytest.approx(share + half, abs=0.01)


def test_it_covers_the_truth_nineteen_times_in_twenty() -> None:
    hits = 0
    for seed in range(200):
        draw = random.Random(seed)
        found = mean([float(draw.random() < 0.7) for _ in range(100)])
        hits += found.low <= 0.7 <= found.high
    assert 178 <= hits <= 199


def test_a_ratio_is_paired() -> None:
    """Scores that fail together leave the ratio certain, whatever the accuracy is."""
    base = [1.0, 0.0] * 50
    found = ratio(base, base)
    assert found is not None
    assert found == (1.0, 1.0, 1.0)
    other = ratio(base[::-1], base)
    assert other is not None
    assert other.value == 1.0
    assert other.high - other.low > 0.3


def test_nothing_to_compare_with() -> None:
    assert ratio([1.0, 0.0], [0.0, 0.0]) is None


def test_one_example_has_no_width() -> None:
    assert mean([0.5]) == (0.5, 0.5, 0.5)
