"""The attended share agrees with a count, page by page, of what each query token attends to."""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.attended import attended_share
from kvplug.config import KvplugConfig

PAGE = 8


def counted(options: dict[str, Any], budget: int, prompt: int, decoded: int) -> float:
    """Token by token, from the definition of windows and regions."""
    sinks = -(-options["sink"] // PAGE)
    attended = available = 0
    for position in range(prompt + decoded):
        first = stop = position
        if position < prompt:
            first = position // options["window"] * options["window"]
            stop = min(first + options["window"], prompt) - 1
        far = max(first + 1 - options["local"], 0) // PAGE - sinks
        sparse = far > budget and stop + 1 > options["dense_below"]
        skipped = (far - budget) * PAGE if sparse else 0
        available += position + 1
        attended += position + 1 - skipped
    return attended / available


@pytest.mark.parametrize(("prompt", "decoded"), [(1000, 0), (1003, 50), (64, 900), (0, 700)])
@pytest.mark.parametrize(("policy", "budget"), [("simhash", 5), ("quest", 5), ("streaming", 0)])
@pytest.mark.parametrize("dense_below", [0, 300])
def test_share(policy: str, budget: int, prompt: int, decoded: int, dense_below: int) -> None:
    options = {"sink": 10, "local": 20, "window": 16, "budget": 40, "dense_below": dense_below}
    config = KvplugConfig.parse({"policy": policy, **options})
    expected = counted(options, budget, prompt, decoded)
    assert expected < 0.9
    # It counts each query's context half a token short.
    half_a_token = 0.5 * (prompt + decoded) / sum(range(1, prompt + decoded + 1))
    assert abs(attended_share(config, PAGE, prompt, decoded) - expected) <= half_a_token


@pytest.mark.parametrize(
    "options",
    [{"policy": "dense"}, {"budget": 1000}, {"local": 1000}, {"dense_below": 1000}],
    ids=str,
)
def test_everything(options: dict[str, Any]) -> None:
    config = KvplugConfig.parse({"budget": 40, "local": 20, "window": 16, "dense_below": 0,
                                 "sink": 10, **options})  # fmt: skip
    assert attended_share(config, PAGE, 900, 40) == 1.0


def test_a_larger_budget_attends_to_more() -> None:
    shares = [
        attended_share(KvplugConfig.parse({"budget": budget}), 32, 32768, 64)
        for budget in (32, 512, 2048, 8192, 40000)
    ]
    assert shares == sorted(set(shares))
    assert shares[-1] == 1.0
