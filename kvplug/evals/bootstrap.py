"""Confidence intervals by the bootstrap (Efron 1979): percentiles over resampled examples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and its 95% interval."""

    value: float
    low: float
    high: float


def _resampled(count: int) -> NDArray[np.int64]:
    """``[RESAMPLES, count]`` examples, the same on every call."""
    return np.random.default_rng(count).integers(0, count, (RESAMPLES, count))


def _interval(value: float, many: Floats) -> Interval:
    """Percentiles of resampled estimates, those that exist."""
    many = many[np.isfinite(many)]
    if not len(many):
        return Interval(value, value, value)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(many, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def mean(scores: list[float]) -> Interval:
    """Mean score of examples."""
    values = np.array(scores, np.float64)
    return _interval(float(values.mean()), values[_resampled(len(values))].mean(1))


def ratio(scores: list[float], base: list[float]) -> Interval | None:
    """Mean score over the mean score of another setup on the same examples, resampled in pairs.

    Returns:
        None where the other setup scored nothing.
    """
    mine, theirs = np.array(scores, np.float64), np.array(base, np.float64)
    if theirs.sum() == 0:
        return None
    picked = _resampled(len(mine))
    sums = theirs[picked].sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        many = mine[picked].sum(1) / sums
    return _interval(float(mine.sum() / theirs.sum()), many)
