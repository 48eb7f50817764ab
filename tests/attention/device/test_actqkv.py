"""ActQKV as a whole on a GPU: representatives, activation probes and shared budgets together."""

from __future__ import annotations

import pytest

from tests.attention.device.schedule import schedule
from tests.attention.device.stock import stand_in
from tests.attention.device.test_entropy import LAYERS, agrees, assert_same_densities
from tests.attention.device.world import SMALL, World

PROMPTS = {0: 230, 1: 70, 2: 241}


@pytest.mark.parametrize("policy", ["actqkv", "hax"])
def test_requests_of_unequal_lengths(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In three layers; with `hax` rows of unequal numbers are shared by hits and mass."""
    stand_in(monkeypatch, SMALL)
    options = {} if policy == "actqkv" else {"last": 2, "active": 1, "budget": "entropy"}
    if policy == "hax":
        options["index"] = "simhash"  # whose scores are more than a few whole numbers
    world = World(policy, layers=LAYERS, options=options, budget=64, sink=16, dense_below=64)
    for pieces in schedule(PROMPTS, 128, 2):
        assert agrees(world, pieces), pieces
    assert_same_densities(world)
