"""Combinations without sense are refused before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError
from kvplug.offload.device_pool import DevicePool
from kvplug.offload.host_store import HostStore
from kvplug.offload.setup import adopt_offload, chain_pools, make_pools
from tests.test_startup import engine

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


def layers_in(memory: torch.Tensor) -> dict[int, SimpleNamespace]:
    """Two layers of 40 pages of 32 tokens in 2 KV heads of 64."""
    halves = memory.view(torch.float16).view(2, 40, 2, 32, 128)
    return {5: SimpleNamespace(kv_cache=halves[0]), 2: SimpleNamespace(kv_cache=halves[1])}


SIZES = {"window": 64, "sink": 32, "local": 64, "budget": 128, "dense_below": 128}
PAGE = 32 * 128 * 2
"""Bytes of a page of one KV head."""


@pytest.mark.parametrize(("pages", "slots"), [(10 * 2, 20), (31, 31), (100, 80)], ids=str)
def test_pools_on_a_device(pages: int, slots: int) -> None:
    """So many pages in each layer, or all that there are; the last layer tells what was counted."""
    store = HostStore()
    layers = layers_in(store.allocate(2 * 40 * 2 * PAGE))
    hot = 2 * pages * PAGE / 2**30
    config = engine({**SIZES, "offload": {"tier": "host", "hot_gib": hot, "cold_gib": 1.0}})
    pools = make_pools(config, layers)
    assert list(pools) == [2, 5]
    for pool in pools.values():
        assert isinstance(pool, DevicePool)
        assert pool.store is store
        assert pool.pages.shape == (slots, 2, 32, 64)
        assert pool.check_integrity()
    told = pools[2]._told  # type: ignore[union-attr]
    told.total += 3
    pools[2].tell()  # type: ignore[union-attr]
    assert told.counts.hits == 0
    pools[5].tell()  # type: ignore[union-attr]
    assert told.counts.hits == 6


def test_pools_that_are_too_small_or_of_another_cache() -> None:
    store = HostStore()
    layers = layers_in(store.allocate(2 * 40 * 2 * PAGE))
    hot = 2 * 19 * PAGE / 2**30
    config = engine({**SIZES, "offload": {"tier": "host", "hot_gib": hot, "cold_gib": 1.0}})
    with pytest.raises(KvplugError, match=r"one window's pages in 2 layers take 0\.0004"):
        make_pools(config, layers)
    with pytest.raises(KvplugError, match="vLLM put the cache elsewhere"):
        make_pools(config, layers_in(torch.zeros(2 * 40 * 2 * PAGE, dtype=torch.int8)))
