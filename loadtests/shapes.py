"""How load changes with time: requests per second of an open loop, users of a closed one.

A shape is one or more phases. Within a phase, load is piecewise linear in time. Between phases
everything in flight is waited for, so that an overloaded phase does not spoil the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvplug.errors import KvplugError
from kvplug.registry import Registry

BURSTS = 4
"""Bursts of a burst shape."""
BURST_SHARE = 0.25
"""Of its time that is burst."""


@dataclass(frozen=True)
class Phase:
    """Load over a span of time, as knots with straight lines between them.

    Two knots at one time are a jump.
    """

    name: str
    times: tuple[float, ...]
    """Seconds since the phase began, from 0, ascending."""
    levels: tuple[float, ...]
    """Requests per second, or users."""

    @property
    def seconds(self) -> float:
        """How long load is offered."""
        return self.times[-1]

    @property
    def peak(self) -> float:
        """The highest level."""
        return max(self.levels)

    def level(self, at: float) -> float:
        """Load at a time; at a jump, what comes after it. 0 outside."""
        if not 0 <= at < self.seconds:
            return 0.0
        place = max(i for i, time in enumerate(self.times[:-1]) if time <= at)
        start, end = self.times[place], self.times[place + 1]
        low, high = self.levels[place], self.levels[place + 1]
        return low if end == start else low + (high - low) * (at - start) / (end - start)


def _flat(name: str, pieces: Sequence[tuple[float, float]]) -> Phase:
    """A phase of pieces, each of some seconds at a level."""
    times: list[float] = []
    levels: list[float] = []
    now = 0.0
    for seconds, level in pieces:
        times += [now, now + seconds]
        levels += [level, level]
        now += seconds
    return Phase(name, tuple(times), tuple(levels))


def _constant(levels: Sequence[float], seconds: float) -> list[Phase]:
    return [_flat(f"{levels[0]:g}", [(seconds, levels[0])])]


def _ramp(levels: Sequence[float], seconds: float) -> list[Phase]:
    return [Phase(f"{levels[0]:g} to {levels[1]:g}", (0.0, seconds), (levels[0], levels[1]))]


def _step(levels: Sequence[float], seconds: float) -> list[Phase]:
    each = seconds / len(levels)
    name = ", ".join(f"{level:g}" for level in levels)
    return [_flat(name, [(each, level) for level in levels])]


def _burst(levels: Sequence[float], seconds: float) -> list[Phase]:
    base, peak = levels
    period = seconds / BURSTS
    piece = [((1 - BURST_SHARE) * period, base), (BURST_SHARE * period, peak)]
    return [_flat(f"{base:g} with bursts of {peak:g}", piece * BURSTS)]


def _sweep(levels: Sequence[float], seconds: float) -> list[Phase]:
    return [_flat(f"{level:g}", [(seconds, level)]) for level in sorted(levels)]


Make = Callable[[Sequence[float], float], list[Phase]]
SHAPES: Registry[tuple[Make, int, int]] = Registry("load shape")
"""Name -> what makes it, and how many levels it takes at least and at most."""
SHAPES.register("constant")((_constant, 1, 1))
SHAPES.register("ramp")((_ramp, 2, 2))
SHAPES.register("step")((_step, 2, 64))
SHAPES.register("burst")((_burst, 2, 2))
SHAPES.register("sweep")((_sweep, 2, 64))


def phases(shape: str, levels: Sequence[float], seconds: float) -> list[Phase]:
    """The phases of a named shape.

    Args:
        shape: A name of SHAPES.
        levels: Requests per second, or users.
        seconds: Of the whole shape; of every level of a sweep.

    Raises:
        KvplugError: Unknown name, or levels that it cannot take.
    """
    make, least, most = SHAPES.get(shape)
    if not least <= len(levels) <= most:
        number = str(least) if least == most else f"{least} to {most}"
        raise KvplugError(f"Shape {shape!r} takes {number} levels, not {len(levels)}.")
    if min(levels) <= 0 or seconds <= 0:
        raise KvplugError("Levels and seconds must be above 0.")
    return make(levels, seconds)
