"""A layer behind a hot pool attends as one without, to the bit; its cache stands in for the host's.

Every step of a :class:`PooledWorld` also asserts that maps agree and that held pages are the cold
store's to the bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.attention.device.pipeline import row_width
from kvplug.errors import KvplugError
from kvplug.offload.device_pool import DevicePool
from kvplug.offload.host_store import HostStore
from kvplug.offload.pools import Pools
from kvplug.offload.told_counts import ToldCounts
from tests.attention.device.pooled import PooledWorld
from tests.attention.device.schedule import schedule
from tests.attention.device.stock import stand_in
from tests.attention.device.test_flash import stand_in_for_flash
from tests.attention.device.test_impl import FEWER, MIXED, SHAPES
from tests.attention.device.world import SMALL, World
from tests.made_up import Piece

LEAST = 8 * SMALL.kv_heads
"""Slots that one window needs: sink, 2 far pages, 5 local ones of each head."""
EVERYTHING = SMALL.num_pages * SMALL.kv_heads


def same(pooled: PooledWorld, plain: World, pieces: list[Piece]) -> None:
    """One step of both."""
    assert torch.equal(pooled.step(pieces), plain.step(pieces))
    assert pooled.selected_as(plain)


@pytest.mark.parametrize(
    ("policy", "slots", "options"),
    [
        ("simhash", EVERYTHING, {"options": FEWER["simhash"]}),
        ("quest", LEAST, {"layout": "BLNHC"}),
        ("hcam", LEAST, {"layout": "LBNHC"}),
        ("infllm", LEAST + 5, {}),
        ("streaming", LEAST, {"layers": 2}),
        ("quest", LEAST + 7, {"options": {"budget": "top_p"}}),
    ],
    ids=str,
)
def test_a_mixed_step(
    policy: str, slots: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, so that the second finds pages; in turns where the pool is small."""
    stand_in(monkeypatch, SMALL)
    pooled, plain = PooledWorld(policy, slots, **options), World(policy, **options)
    for world in (pooled, plain):
        world.fill(MIXED)
    for _ in range(2):
        same(pooled, plain, MIXED)
        assert (pooled.turns == 1) == (slots == EVERYTHING)


@pytest.mark.parametrize("name", ["g1", "g3", "g8"])
def test_other_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and pages of other sizes, and pools of an odd number of slots."""
    shape = SHAPES[name]
    stand_in(monkeypatch, shape)
    plain = World("streaming", shape)
    slots = row_width(plain.builder.pipeline.geometry) * shape.kv_heads + 1
    pooled = PooledWorld("streaming", slots, shape)
    pieces = [MIXED[0], Piece(1, 128, 37, True), MIXED[4]]
    for world in (pooled, plain):
        world.fill(pieces)
        world.step(pieces)
    same(pooled, plain, [Piece(0, 151, 1, False), Piece(4, 202, 1, False)])


@pytest.mark.parametrize(
    ("policy", "layers", "slots"), [("quest", 1, LEAST), ("simhash", 2, LEAST + 3)], ids=str
)
def test_requests_from_their_first_tokens(
    policy: str, layers: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of prompts beside decoded tokens, of unequal lengths."""
    stand_in(monkeypatch, SMALL)
    options: dict[str, Any] = {"options": FEWER.get(policy, {}), "layers": layers}
    pooled, plain = PooledWorld(policy, slots, **options), World(policy, **options)
    turns = set()
    for pieces in schedule({0: 158, 1: 75, 2: 129}, 64, 3):
        same(pooled, plain, pieces)
        turns.add(pooled.turns)
    assert {0, 1} < turns  # dense steps, steps that fit, and others
    assert pooled.told.counts.evictions > 0


def test_pages_of_other_requests_are_filled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool holds copies of what the pages were; part of a page stays as it was."""
    stand_in(monkeypatch, SMALL)
    worlds = PooledWorld("quest", EVERYTHING), World("quest")
    for world in worlds:
        world.fill([MIXED[0], MIXED[4]])
        world.step([MIXED[0], MIXED[4]])
        world._free.extend(world.pages.pop(0) + world.pages.pop(4))
    entries = worlds[0].pools[0]._maps.entry_in
    held = set((entries[entries >= 0] // SMALL.kv_heads).tolist())
    for pieces in schedule({5: 100, 6: 137}, 96, 2):
        same(*worlds, pieces)
    assert len(held & {*worlds[0].pages[5], *worlds[0].pages[6]}) > 4


def test_prefixes_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that begins on pages of another, while that is decoded, gets the same answer."""
    stand_in(monkeypatch, SMALL)
    pooled, plain = PooledWorld("simhash", 3 * LEAST), World("simhash")
    for world in (pooled, plain):
        world.content_of[4] = 1
        world.fill([Piece(1, 160, 1, False)])
        world.pages[4] = world.pages[1][:8]  # 128 tokens
    both = [Piece(1, 160, 1, False), Piece(4, 128, 32, True)]
    same(pooled, plain, both)
    alone = pooled.step([Piece(1, 161, 1, False)])
    hit = pooled.step([Piece(4, 160, 1, False)])
    assert torch.equal(hit, plain.step([Piece(4, 160, 1, False)]))
    assert alone.shape == hit.shape


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Different pages of heads that were asked for, against the rows that were selected."""
    stand_in(monkeypatch, SMALL)
    pooled = PooledWorld("simhash", EVERYTHING, layers=2)
    pieces = [Piece(0, 200, 1, False), Piece(4, 128, 33, True)]
    pooled.fill(pieces)
    planned = pooled.told.counts.turns
    asked: list[set[tuple[int, int]]] = [set(), set()]
    hits = misses = 0
    for start in range(200, 202):
        pooled.step([Piece(0, start, 1, False), *pieces[1:]])
        for rank, selected in enumerate(pooled.selected()):
            mine = {(h, p) for heads in selected.values() for h, ps in enumerate(heads) for p in ps}
            hits += len(mine & asked[rank])
            misses += len(mine - asked[rank])
            asked[rank] |= mine
    counts = pooled.told.counts
    assert counts.bytes_written == 2 * (328 + 2 * 34) * 2 * 2 * 64 * 2
    assert (counts.hits, counts.misses, counts.evictions) == (hits, misses, 0)
    assert counts.bytes_read == misses * 16 * 128 * 2
    assert counts.turns - planned == 2 * 2
    assert pooled.pools[0].counts.misses == len(asked[0])
    assert counts.failed == counts.stall_s == 0
    pools = Pools(pooled.pools)
    assert pools.counts == counts
    assert pools.nbytes > 2 * pooled.pools[0].pages.nbytes
    assert pools.take_unreadable() == set()


@pytest.mark.parametrize("slots", [LEAST, EVERYTHING], ids=str)
def test_flash_attention_reads_the_pool(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with its arguments, in turns too."""
    stand_in(monkeypatch, SMALL)
    monkeypatch.setattr(
        "kvplug.attention.device.impl.vllm_function", lambda dim, has_cap: stand_in_for_flash
    )
    options: dict[str, Any] = {"options": {"attend": "flash"}}
    pooled, plain = PooledWorld("streaming", slots, **options), World("streaming", **options)
    for world in (pooled, plain):
        world.fill(MIXED)
    same(pooled, plain, MIXED)


def test_another_budget_must_fit_the_pool() -> None:
    pipeline = PooledWorld("quest", LEAST + 4).builder.pipeline
    pipeline.set_budget(64)
    with pytest.raises(KvplugError, match=r"needs 22 pages of KV heads .* which has 20"):
        pipeline.set_budget(80)
    assert pipeline.geometry.budget_pages == 4


def test_a_cold_store_that_cannot_be_numbered() -> None:
    huge = torch.empty(1, dtype=torch.float16).expand(2**30, 2, 16, 128)
    with pytest.raises(KvplugError, match="more than the hot pool can number"):
        DevicePool(huge, HostStore(), 1, ToldCounts(1, 1, huge.device), 0)
