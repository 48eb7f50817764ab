"""Arrivals come from a seed and follow the rate: counts by its integral, gaps by theory."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.arrivals import arrivals, inverse
from kvplug.loadtests.shapes import Phase, phases

MANY = 10**6
SHAPES = [
    ("constant", [3.0]), ("ramp", [1.0, 7.0]), ("ramp", [7.0, 1.0]), ("step", [2.0, 8.0, 1.0]),
    ("burst", [1.0, 20.0]),
]  # fmt: skip


def area(phase: Phase, until: float) -> float:
    """The integral of the rate, by summing 20,000 thin slices."""
    slices = 20_000
    return sum(phase.level((i + 0.5) * until / slices) for i in range(slices)) * until / slices


@pytest.mark.parametrize(("shape", "levels"), SHAPES)
def test_constant_arrivals_cut_the_integral_evenly(shape: str, levels: list[float]) -> None:
    (phase,) = phases(shape, levels, 12)
    times = arrivals(phase, "constant", "", MANY)
    # The slices' error is at most a slice's width at a jump.
    assert len(times) == math.floor(area(phase, 12) + 0.5)
    for number, at in list(enumerate(times))[:: max(1, len(times) // 7)]:
        assert area(phase, at) == pytest.approx(number + 0.5, abs=0.02)


@pytest.mark.parametrize(("shape", "levels"), SHAPES)
def test_inverse_ends_with_the_phase(shape: str, levels: list[float]) -> None:
    (phase,) = phases(shape, levels, 12)
    total = round(area(phase, 12), 6)
    assert inverse(phase, 0.0) == 0.0
    assert inverse(phase, total + 0.01) is None
    assert inverse(phase, total - 1e-3) == pytest.approx(12, abs=0.01)


def test_poisson_gaps_are_exponential() -> None:
    (phase,) = phases("constant", [50], 200)
    times = arrivals(phase, "poisson", "a", MANY)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    # 10,000 arrivals expected; mean and deviation of a gap are both 1/50. Five standard errors.
    assert abs(len(times) - 10_000) < 5 * 100
    assert statistics.fmean(gaps) == pytest.approx(0.02, rel=5 / 100)
    assert statistics.stdev(gaps) == pytest.approx(0.02, rel=5 * math.sqrt(2) / 100)


def test_poisson_follows_a_ramp() -> None:
    (phase,) = phases("ramp", [0.1, 200], 100)
    times = arrivals(phase, "poisson", "b", MANY)
    # Half of a ramp's arrivals come in the last 1 - 1/sqrt(2) of it.
    late = sum(at > 100 / math.sqrt(2) for at in times)
    assert late == pytest.approx(len(times) / 2, abs=5 * math.sqrt(len(times)) / 2)


def test_a_seed_gives_the_same_times_and_another_gives_others() -> None:
    (phase,) = phases("burst", [5, 50], 10)
    first = arrivals(phase, "poisson", "seed 1", MANY)
    assert arrivals(phase, "poisson", "seed 1", MANY) == first
    assert arrivals(phase, "poisson", "seed 2", MANY) != first
    assert arrivals(phase, "poisson", "seed 1", 7) == first[:7]
    assert first == sorted(first)


def test_an_unknown_process_is_refused() -> None:
    (phase,) = phases("constant", [1], 1)
    with pytest.raises(KvplugError, match="did you mean 'poisson'"):
        arrivals(phase, "poison", "", 1)
