"""Line charts as SVG inside a page: no scripts, no fonts, nothing from a network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 30, 44
COLOURS = 6
"""Classes ``c0`` to ``c5`` of the page's style; dashes tell further lines apart."""
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One server's points."""

    name: str
    points: Points
    bands: Sequence[tuple[float, float, float]] = field(default=())
    """x, low, high: drawn as bars of uncertainty."""
    dots: bool = False
    """Dots without a line."""
    order: int = 0
    """Which colour."""


def chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], marks: Points = ()) -> str:
    """A chart.

    Args:
        title: Above it, and its description for those who cannot see it.
        x_label: With its unit.
        y_label: With its unit.
        lines: What is drawn; lines without points are named all the same.
        marks: Points with a ring around them.

    Returns:
        SVG, to be put into HTML.
    """
    places = [p for line in lines for p in line.points]
    places += [(x, y) for line in lines for x, low, high in line.bands for y in (low, high)]
    if not places:
        return ""
    across = Axis([x for x, _ in places], LEFT, WIDTH - RIGHT)
    up = Axis([y for _, y in places], HEIGHT - BOTTOM, TOP)
    parts = [_grid(across, up, x_label, y_label)]
    for line in lines:
        parts.append(_line(line, across, up))
    parts += [
        f'<circle class=ring cx="{across.at(x):.1f}" cy="{up.at(y):.1f}" r="8"/>' for x, y in marks
    ]
    told = html.escape(title)
    return (
        f'<figure><figcaption>{told}</figcaption>{_legend(lines)}<svg role=img aria-label="{told}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg></figure>'
    )


class Axis:
    """Values from 0, or from below it, to a round number; their places on the page."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        """Holds ``values`` between the places ``start`` and ``end``."""
        self._start, self._end = start, end
        self.low = min(0.0, *values)
        high = max(*values, self.low)
        self.step = _round_step((high - self.low) or 1.0)
        self.high = self.low + self.step * math.ceil(((high - self.low) or 1.0) / self.step - 1e-9)

    def at(self, value: float) -> float:
        """A value's place."""
        share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round values, both ends among them."""
        return [
            self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)
        ]


def _round_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, that cuts a span into four to ten."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= span / 4)


def _grid(across: Axis, up: Axis, x_label: str, y_label: str) -> str:
    """Lines, numbers and labels."""
    parts = []
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(
            f'<path class=grid d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor=end>{tick:.6g}</text>'
        )
    for tick in across.ticks():
        parts.append(
            f'<text x="{across.at(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor=middle>'
            f"{tick:.6g}</text>"
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor=middle>'
        f"{html.escape(x_label)}</text>"
        f'<text transform="translate(14 {middle})rotate(-90)" text-anchor=middle>'
        f"{html.escape(y_label)}</text>"
    )
    return "".join(parts)


def _line(line: Line, across: Axis, up: Axis) -> str:
    """Points of one server."""
    colour = f"c{line.order % COLOURS}"
    places = [f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in line.points]
    parts = [
        f'<path class="line {colour}" d="M{across.at(x):.1f} {up.at(low):.1f}V{up.at(high):.1f}"/>'
        for x, low, high in line.bands
    ]
    if places and not line.dots:
        dash = ' stroke-dasharray="5 4"' if line.order >= COLOURS else ""
        parts.append(f'<path class="line {colour}"{dash} d="M{"L".join(places)}"/>')
    if line.dots or len(places) < 40:
        parts += [
            f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="2.5"/>'
            for x, y in (place.split() for place in places)
        ]
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> str:
    """Names with their colours."""
    names = "".join(
        f'<span class="key c{line.order % COLOURS}">{html.escape(line.name)}</span>'
        for line in lines
    )
    return f"<p class=keys>{names}</p>"


def distribution(values: Sequence[float]) -> list[tuple[float, float]]:
    """Points of the share of values at or below each, at most 200 of them."""
    ordered = sorted(values)
    count = len(ordered)
    kept = (
        sorted({round(i * (count - 1) / 199) for i in range(200)}) if count > 200 else range(count)
    )
    return [(ordered[i], (i + 1) / count) for i in kept]
