"""The knee of a sweep: the highest load that is sustained within the limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from kvplug.evals.bootstrap import LEVEL, RESAMPLES


class Level(NamedTuple):
    """One load of a sweep."""

    load: float
    good: list[bool]
    """Whether each of its requests kept the limits."""


class Knee(NamedTuple):
    """Where a server bends. Loads are those that were tried, nothing between them."""

    load: float
    """The highest at which, and below which, enough requests are good; 0: none."""
    low: float
    high: float
    """95% interval, by the bootstrap over requests."""
    fails_at: float | None
    """The lowest load that was not sustained; None: the sweep ended first."""


def knee(levels: Sequence[Level], share: float) -> Knee:
    """The knee.

    Args:
        levels: Of the sweep, by ascending load, each with requests.
        share: Of requests that must be good.
    """
    loads = [level.load for level in levels]
    shares = np.array([np.mean(level.good) for level in levels])
    draw = np.random.default_rng(len(levels))
    # A share of n resampled requests is a binomial count over n.
    many = np.stack([
        draw.binomial(len(level.good), found, RESAMPLES) / len(level.good)
        for level, found in zip(levels, shares, strict=True)
    ])  # fmt: skip
    highest = [_highest(loads, column, share) for column in many.T]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(highest, [tail, 1 - tail], method="inverted_cdf")
    found = _highest(loads, shares, share)
    above = [load for load in loads if load > found]
    return Knee(found, float(low), float(high), above[0] if above else None)


def _highest(loads: Sequence[float], shares: Iterable[float], share: float) -> float:
    """The highest load up to which all are sustained."""
    best = 0.0
    for load, found in zip(loads, shares, strict=True):
        if found < share:
            break
        best = load
    return best
