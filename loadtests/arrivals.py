"""When requests of an open loop are sent: times drawn from a seed, whatever the server does.

Arrivals at a changing rate are arrivals at rate 1 seen through the inverse of the cumulative rate
(time rescaling; Çinlar, Introduction to Stochastic Processes, 1975, theorem 4.7.4).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

from kvplug.loadtests.shapes import Phase
from kvplug.registry import Registry


def _poisson(source: random.Random) -> Iterator[float]:
    """A Poisson process of rate 1: independent exponential gaps."""
    now = 0.0
    while True:
        now += source.expovariate(1.0)
        yield now


def _constant(source: random.Random) -> Iterator[float]:
    """Even gaps of 1, the first arrival in the middle of one."""
    now = 0.5
    while True:
        yield now
        now += 1.0


PROCESSES: Registry[Callable[[random.Random], Iterator[float]]] = Registry("arrival process")
PROCESSES.register("poisson")(_poisson)
PROCESSES.register("constant")(_constant)


def arrivals(phase: Phase, process: str, seed: str, most: int) -> list[float]:
    """Times of arrival in a phase, ascending.

    Args:
        phase: The rate over time, in requests per second.
        process: ``poisson`` or ``constant``.
        seed: Same seed, same times.
        most: Arrivals at most.

    Returns:
        Seconds since the phase began.

    Raises:
        KvplugError: Unknown process.
    """
    times: list[float] = []
    for area in PROCESSES.get(process)(random.Random(seed)):
        at = inverse(phase, area)
        if at is None or len(times) == most:
            return times
        times.append(at)
    raise AssertionError("arrivals do not end by themselves")


def inverse(phase: Phase, area: float) -> float | None:
    """The time at which the rate's integral reaches ``area``; None if it never does."""
    knots = list(zip(phase.times, phase.levels, strict=True))
    for (start, low), (end, high) in itertools.pairwise(knots):
        piece = (low + high) / 2 * (end - start)
        if area < piece:
            slope = (high - low) / (end - start)
            # The root of low x + slope x^2 / 2 = area that does not cancel for small slopes.
            return start + 2 * area / (low + math.sqrt(low * low + 2 * slope * area))
        area -= piece
    return None
