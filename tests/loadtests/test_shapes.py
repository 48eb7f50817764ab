"""Shapes have the levels that their names promise, at the times that they promise."""

from __future__ import annotations

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.shapes import phases


def levels_at(shape: str, levels: list[float], seconds: float, times: list[float]) -> list[float]:
    (phase,) = phases(shape, levels, seconds)
    return [phase.level(at) for at in times]


def test_constant_and_its_ends() -> None:
    assert levels_at("constant", [3], 10, [-0.1, 0, 9.99, 10]) == [0, 3, 3, 0]


def test_ramp_is_a_line() -> None:
    assert levels_at("ramp", [2, 12], 10, [0, 2.5, 5]) == [2, 4.5, 7]


def test_step_jumps() -> None:
    assert levels_at("step", [1, 5, 2], 9, [0, 2.999, 3, 6, 8.999]) == [1, 1, 5, 2, 2]


def test_burst_is_a_quarter_of_the_time_at_its_peak() -> None:
    times = [i * 0.25 + 0.125 for i in range(64)]
    found = levels_at("burst", [1, 9], 16, times)
    assert found.count(9) == 16
    assert found[:16] == [1] * 12 + [9] * 4
    assert found == found[:16] * 4


def test_sweep_is_a_phase_a_level_in_order() -> None:
    found = phases("sweep", [4, 1, 2], 5)
    assert [(phase.peak, phase.seconds) for phase in found] == [(1, 5), (2, 5), (4, 5)]


@pytest.mark.parametrize(
    ("shape", "levels", "seconds", "words"),
    [
        ("stepp", [1], 1, "did you mean 'step'"),
        ("ramp", [1], 1, "takes 2 levels, not 1"),
        ("sweep", [1], 1, "takes 2 to 64 levels"),
        ("constant", [0], 1, "above 0"),
        ("constant", [1], 0, "above 0"),
    ],
)
def test_nonsense_is_refused(
    shape: str, levels: list[float], seconds: float, words: str
) -> None:  # fmt: skip
    with pytest.raises(KvplugError, match=words):
        phases(shape, levels, seconds)
