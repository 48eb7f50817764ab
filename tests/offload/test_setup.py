"""Combinations without sense are refused before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError
from kvplug.offload.setup import adopt_offload, chain_pools

HOST = {"tier": "host", "hot_gib": 1.0, "cold_gib": 4.0}


def refusal(policy: str, **offload: Any) -> str:
    """What is said of a combination."""
    config = KvplugConfig.parse({"policy": policy, "offload": {**HOST, **offload}})
    with pytest.raises(KvplugError) as caught:
        adopt_offload(SimpleNamespace(cache_config=SimpleNamespace()), config)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("policy", ["simhash", "streaming", "hax"])
def test_mass_needs_scores_that_are_logits(policy: str) -> None:
    said = refusal(policy, eviction="mass")
    assert "offload.eviction='mass' needs scores on the scale of attention logits" in said
    assert repr(policy) in said


@pytest.mark.parametrize("policy", ["channels", "hcam"])
def test_events_give_way_where_there_are_events(policy: str) -> None:
    said = refusal(policy, eviction="event")
    assert "offload.eviction='event' needs a segment stage" in said
    assert repr(policy) in said


def test_layers_that_follow_each_other_know_it() -> None:
    """A dense one between two leaves them apart, as another number of heads does."""
    pools = {n: SimpleNamespace(shape=(9, 1 + (n == 6), 32, 8), next=None) for n in (2, 3, 5, 6)}
    chain_pools(pools)  # type: ignore[arg-type]
    assert pools[2].next is pools[3]
    assert pools[3].next is None
    assert pools[5].next is None
    with pytest.raises(KvplugError, match="no two layers one after the other that retrieve"):
        chain_pools({n: SimpleNamespace(shape=(9,), next=None) for n in (2, 4)})  # type: ignore[misc]


def test_everything_attended_is_nothing_cold() -> None:
    assert "attends to everything" in refusal("dense")


def test_the_cold_store_holds_the_hot_pages_too() -> None:
    assert "must be at least hot_gib" in refusal("quest", cold_gib=0.5)
