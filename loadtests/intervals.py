"""Quantiles with 95% intervals, by the bootstrap over requests (Efron 1979).

Values of one request depend on each other, so requests are drawn anew, each with all its values
(the cluster bootstrap: Davison and Hinkley, Bootstrap Methods and their Application, 1997, 3.8).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvplug.evals.bootstrap import LEVEL, RESAMPLES, Interval

MOST_WORK = 20_000_000
"""Values looked at in all; fewer resamples where there are many of them."""
FEWEST = 200
"""Resamples, at least."""


def quantiles(groups: Sequence[Sequence[float]], shares: Sequence[float]) -> list[Interval]:
    """Quantiles of all values together.

    A quantile is the least value with at least its share of values at or below it.

    Args:
        groups: The values of each request; requests without any do not count.
        shares: Which quantiles, 0 to 1.

    Returns:
        One interval for each share; none if there are no values.
    """
    filled = [group for group in groups if len(group)]
    if not filled:
        return []
    values = np.concatenate([np.asarray(group, np.float64) for group in filled])
    owner = np.repeat(np.arange(len(filled)), [len(group) for group in filled])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    point = _at(values, np.ones(len(values)), shares)
    draw = np.random.default_rng(len(filled))
    count = int(np.clip(MOST_WORK // len(values), FEWEST, RESAMPLES))
    many = np.empty((count, len(shares)))
    for row in many:
        times = np.bincount(draw.integers(0, len(filled), len(filled)), minlength=len(filled))
        row[:] = _at(values, times[owner].astype(np.float64), shares)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(many, [tail, 1 - tail], axis=0)
    return [Interval(*map(float, found)) for found in zip(point, low, high, strict=True)]


def _at(
    values: NDArray[np.float64], weights: NDArray[np.float64], shares: Sequence[float]
) -> NDArray[np.float64]:
    """Quantiles of sorted, weighted values."""
    sums = np.cumsum(weights)
    # A hair less than the share: 0.07 x 100 must be 7 values, not 7.000000000000001.
    wanted = np.asarray(shares) * sums[-1] - 1e-9
    return values[np.minimum(np.searchsorted(sums, wanted), len(values) - 1)]
