"""Charts are well-formed, hold every point, and their axes end in round numbers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from kvplug.loadtests.chart import HEIGHT, WIDTH, Axis, Line, chart, distribution


def svg_of(text: str) -> ElementTree.Element:
    """The picture, with quotes around attributes, as XML wants them and HTML does not."""
    found = re.search(r"<svg.*</svg>", text)
    assert found is not None
    return ElementTree.fromstring(re.sub(r"(\s[\w-]+)=([\w-]+)(?=[\s>/])", r'\1="\2"', found[0]))


def test_every_point_is_inside() -> None:
    line = Line("a & <b>", [(0.0, 0.0), (3.0, 7.0), (9.0, 5.0)], [(3.0, 6.0, 8.0)])
    text = chart("A <title>", "s", "tokens", [line, Line("empty", [])], [(3.0, 7.0)])
    assert "A &lt;title&gt;" in text
    assert "a &amp; &lt;b&gt;" in text
    assert "empty" in text
    circles = svg_of(text).findall("circle")
    assert len(circles) == 4
    for circle in circles:
        assert 0 < float(circle.attrib["cx"]) < WIDTH
        assert 0 < float(circle.attrib["cy"]) < HEIGHT


def test_nothing_to_draw() -> None:
    assert chart("x", "", "", [Line("a", [])]) == ""


@pytest.mark.parametrize(
    "values", [[0.0], [5.0], [1e-5, 3e-5], [-2.0, 7.0], [123456.0], [1.0, 1.0]]
)
def test_axes_hold_their_values(values: list[float]) -> None:
    axis = Axis(values, 0, 100)
    assert axis.low <= min(values)
    assert axis.high >= max(values) * (1 - 1e-9)
    ticks = axis.ticks()
    assert 4 <= len(ticks) <= 12
    assert all(0 <= axis.at(value) <= 100 + 1e-9 for value in values)
    assert axis.at(ticks[-1]) == pytest.approx(100)


def test_distribution() -> None:
    assert distribution([3.0, 1.0]) == [(1.0, 0.5), (3.0, 1.0)]
    many = distribution([float(i) for i in range(1000)])
    assert len(many) <= 200
    assert many[0] == (0.0, 0.001)
    assert many[-1] == (999.0, 1.0)
