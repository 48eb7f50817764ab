"""Pairs are by prompt: medians of ratios, and answers side by side."""

from __future__ import annotations

import pytest

from kvplug.loadtests.pairs import pair
from tests.loadtests.made_up import failed, record


def test_ratios_are_by_request() -> None:
    base = [record(session=i, first=4.0 * (i + 1), end=20.0) for i in range(3)]
    mine = [
        record(setup="b", session=2, first=2.0, end=10.0, gaps=[0.1, 0.1]),
        record(setup="b", session=1, first=1.0, end=5.0, gaps=[0.25, 0.25]),
        record(setup="b", session=0, first=4.0, end=40.0, gaps=[0.5, 0.5], text="blue harbor.",
               right=False),
    ]  # fmt: skip
    found = pair(base, mine, 10.0, 45.0)
    assert found is not None
    assert (found.setup, found.base, found.requests) == ("b", "a", 3)
    assert found.ttft is not None
    assert found.total is not None
    assert found.gap is not None
    assert found.ttft.value == pytest.approx(6.0)  # of 1, 8 and 6
    assert (found.ttft.low, found.ttft.high) == (1, 8)
    assert found.total.value == pytest.approx(2.0)  # of 0.5, 4 and 2
    assert found.gap.value == pytest.approx(2.0)  # of 1, 2 and 5
    assert (found.same_text, found.right, found.base_right, found.checked) == (2, 2, 3, 3)
    assert found.output_ratio == 4.5


def test_only_what_both_answered_is_compared() -> None:
    base = [record(session=0), failed(session=1), record(session=2)]
    mine = [failed(setup="b", session=0), record(setup="b", session=1),
            record(setup="b", session=2, first=0.5), record(setup="b", session=3)]  # fmt: skip
    found = pair(base, mine, 0.0, 1.0)
    assert found is not None
    assert found.requests == 1
    assert found.ttft is not None
    assert found.ttft.value == 2.0
    assert found.output_ratio is None


def test_nothing_in_common() -> None:
    assert pair([], [record()], 1.0, 1.0) is None
    found = pair([record(session=0)], [record(setup="b", session=1)], 1.0, 1.0)
    assert found is not None
    assert (found.requests, found.ttft) == (0, None)
