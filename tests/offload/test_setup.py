"""Combinations without sense are refused before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError
from kvplug.offload.setup import adopt_offload

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


def test_everything_attended_is_nothing_cold() -> None:
    assert "attends to everything" in refusal("dense")


def test_the_cold_store_holds_the_hot_pages_too() -> None:
    assert "must be at least hot_gib" in refusal("quest", cold_gib=0.5)
