"""Lengths follow their distribution and never leave its ends; bad ones are named."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.lengths import SHORTEST, parse_lengths


def drawn(text: str, count: int = 4000) -> list[int]:
    lengths, source = parse_lengths(text), random.Random(1)
    return [lengths.draw(source) for _ in range(count)]


@pytest.mark.parametrize("text", ["fixed:300", "300"])
def test_fixed(text: str) -> None:
    assert set(drawn(text, 10)) == {300}


def test_uniform_reaches_both_ends_evenly() -> None:
    values = drawn("uniform:200-209")
    assert set(values) == set(range(200, 210))
    # 400 of each are expected; 5 standard deviations of a binomial count.
    spread = 5 * math.sqrt(4000 * 0.1 * 0.9)
    assert all(abs(values.count(v) - 400) < spread for v in range(200, 210))


def test_lognormal_has_its_median_and_spread() -> None:
    logs = [math.log(value) for value in drawn("lognormal:8192,0.5,1000000")]
    # Standard errors of mean and deviation of 4,000 normal values, five times.
    assert abs(statistics.fmean(logs) - math.log(8192)) < 5 * 0.5 / math.sqrt(4000)
    assert abs(statistics.stdev(logs) - 0.5) < 5 * 0.5 / math.sqrt(8000)


def test_lognormal_is_cut_off() -> None:
    values = drawn("lognormal:200,2,300")
    assert min(values) == SHORTEST
    assert max(values) == 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unifrom:1-2", "did you mean 'uniform'"),
        ("fixed:many", "must be like fixed:32768"),
        ("uniform:500", "must be like"),
        ("uniform:500-400", "the shorter one first"),
        ("fixed:1", "between 128 and"),
        ("lognormal:8192,0,9000", "must be like"),
        ("lognormal:8192,0.5,400", "must be like"),
        ("lognormal:nan,0.5,400", "must be like"),
        ("fixed:99999999", "between 128 and"),
    ],
)
def test_nonsense_is_refused(text: str, words: str) -> None:
    with pytest.raises(KvplugError, match=words):
        parse_lengths(text)
