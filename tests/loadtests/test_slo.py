"""A request is good when it keeps every limit; limits are read strictly."""

from __future__ import annotations

import math

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.slo import Slo, parse_slo
from tests.loadtests.made_up import failed, record


def test_reading() -> None:
    assert parse_slo("ttft=2,e2e=30", 0.9) == Slo(2.0, math.inf, 30.0, 0.9)
    assert parse_slo("", 1.0) == Slo(share=1.0)
    assert str(parse_slo("gap=0.1", 0.9)) == "gap at most 0.1 s"
    assert str(Slo()) == "no limits"


@pytest.mark.parametrize(
    ("text", "share", "words"),
    [("tfft=2", 0.9, "did you mean 'ttft'"), ("ttft=fast", 0.9, "must be like ttft=2"),
     ("ttft=0", 0.9, "above 0"), ("ttft=nan", 0.9, "above 0"), ("ttft", 0.9, "like ttft=2"),
     ("", 0.0, "slo-share gives 0"), ("", 1.5, "at most 1"), ("", math.nan, "at most 1")],
)  # fmt: skip
def test_nonsense_is_refused(text: str, share: float, words: str) -> None:
    with pytest.raises(KvplugError, match=words):
        parse_slo(text, share)


@pytest.mark.parametrize(
    ("slo", "is_good"),
    [(Slo(), True), (Slo(ttft=1.0), True), (Slo(ttft=0.99), False), (Slo(gap=0.5), True),
     (Slo(gap=0.49), False), (Slo(e2e=2.0), True), (Slo(e2e=1.99), False)],
)  # fmt: skip
def test_every_limit_counts(slo: Slo, is_good: bool) -> None:
    assert slo.is_good(record()) is is_good
    assert not slo.is_good(failed())
    assert not slo.is_good(record(error="cut off"))


def test_limits_count_from_the_intended_time() -> None:
    assert not Slo(ttft=1.0).is_good(record(intended=-0.5))
