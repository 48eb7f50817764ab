"""Whatever is written and asked for, in any order, slots hold what the cold store holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvplug.config import OffloadConfig
from kvplug.errors import KvplugError
from kvplug.offload.ahead import KINDS
from kvplug.offload.cold_store import ColdStore
from kvplug.offload.hot_pool import HotPool, slots_for
from kvplug.offload.links import NONE, Links
from kvplug.offload.written import Written

PAGES, HEADS, PAGE, DIM = 40, 2, 32, 8
WIDTH = 6
LEAST = WIDTH * HEADS
SHAPE = (PAGES, HEADS, PAGE, 2 * DIM)
NOTHING = Written.of(torch.tensor([-1]), PAGE)
SIZE = PAGE * 2 * DIM * 2
NBYTES = PAGES * HEADS * SIZE


def made_store(tier: str, folder: Path, **options: Any) -> tuple[ColdStore, torch.Tensor]:
    """A store of two layers, and both layers' caches ``[2, pages, Hk, P, 2 * D]``."""
    path = str(folder) if tier == "disk" else None
    store = ColdStore(OffloadConfig.model_validate({"tier": tier, "path": path, **options}), 0)
    return store, store.allocate(2 * NBYTES).view(torch.bfloat16).view(2, *SHAPE)


class Engine:
    """Writes pages and attends to rows at random, as an engine does, and checks every slot.

    Args:
        stored: A store and the layers' caches in it.
        slots: Of each pool.
        seed: Of everything.
    """

    def __init__(self, stored: tuple[ColdStore, torch.Tensor], slots: int, seed: int) -> None:
        self.store, self.caches = stored
        self.links = Links(PAGES)
        self.pools = [HotPool(cache, self.store, slots, self.links) for cache in self.caches]
        if "next_layer" in self.store.offload.prefetch:
            self.pools[0].next = self.pools[1]
        self.draw = np.random.default_rng(seed)
        self.truth = self.caches.clone()
        self.written = NOTHING

    def write(self, layer: int, pages: list[int], slots: list[int]) -> None:
        """The step's tokens get keys in a layer."""
        for slot in slots:
            content = torch.from_numpy(self.draw.standard_normal((HEADS, 2 * DIM))).bfloat16()
            for cache in (self.caches, self.truth):
                cache[layer, slot // PAGE, :, slot % PAGE] = content

    def places(self, pages: list[int]) -> list[int]:
        """Some tokens of pages."""
        slots: list[int] = []
        for page in pages:
            first, count = int(self.draw.integers(0, PAGE)), int(self.draw.integers(1, PAGE + 1))
            slots += range(page * PAGE + first, page * PAGE + min(first + count, PAGE))
        self.written = Written.of(torch.tensor([*slots, -1]), PAGE)
        return slots

    def attend(self, windows: list[list[int]], layer: int = 0) -> int:
        """Rows of pages for every window and head; each head sees them in an order of its own."""
        table = np.zeros((len(windows) * HEADS, WIDTH), np.int32)
        lengths = np.zeros(len(table), np.int32)
        for w, pages in enumerate(windows):
            for head in range(HEADS):
                row = np.array(pages)[self.draw.permutation(len(pages))]
                table[w * HEADS + head, : len(pages)] = row * HEADS + head
                lengths[w * HEADS + head] = len(pages) * PAGE - int(self.draw.integers(0, PAGE))
        turns, done, pool = 0, 0, self.pools[layer]
        slots, shares = np.zeros_like(table), None
        if self.store.offload.eviction == "mass":
            shares = self.draw.random(table.shape).astype(np.float32)
        for first, last in pool.turns(table, lengths, slots, self.written, shares):
            assert first == done
            done, turns = last, turns + 1
            truth = self.truth[layer].flatten(0, 1)
            for place in range(first * HEADS, done * HEADS):
                count = -(-int(lengths[place]) // PAGE)
                held = pool.pages[slots[place, :count], 0]
                assert torch.equal(held, truth[table[place, :count]])
        assert done == len(windows)
        return turns

    def link(self) -> None:
        """Random neighbours and events, true or not: old links may say anything."""
        for array in self.links.arrays:
            array[:] = self.draw.integers(NONE, PAGES, PAGES)

    def step(self) -> None:
        """One random step, through both layers."""
        pages = self.draw.choice(PAGES, int(self.draw.integers(0, 4)), replace=False).tolist()
        slots, is_dense = self.places(pages), self.draw.random() < 0.2
        windows = [
            self.draw.choice(PAGES, int(self.draw.integers(1, WIDTH + 1)), replace=False).tolist()
            for _ in range(int(self.draw.integers(1, 4)))
        ]
        self.link()
        for layer, pool in enumerate(self.pools):
            self.write(layer, pages, slots)
            if is_dense:
                pool.rewrite(self.written)
            else:
                self.attend(windows, layer)
            if self.draw.random() < 0.5:
                assert pool.check_integrity()


EVERY = [
    {},
    {"eviction": "mass"},
    {"eviction": "event"},
    {"prefetch": ["next_layer"]},
    {"prefetch": ["last", "events"], "eviction": "event"},
    {"prefetch": list(KINDS), "eviction": "mass"},
]


def name_of(options: dict[str, Any]) -> str:
    return "-".join([options.get("eviction", "lru"), *options.get("prefetch", [])])


@pytest.mark.parametrize("options", EVERY, ids=name_of)
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_random_steps(
    tier: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    for slots in (LEAST, LEAST + 1, 3 * LEAST, PAGES * HEADS):
        stored = made_store(tier, tmp_path_factory.mktemp("cold"), **options)
        engine = Engine(stored, slots, seed=slots)
        for _ in range(40):
            engine.step()
        for pool in engine.pools:
            assert pool.check_integrity()
            counts = pool.counts
            ahead = [getattr(counts, f"prefetched_{kind}") for kind in KINDS]
            used = [getattr(counts, f"prefetch_hits_{kind}") for kind in KINDS]
            assert (counts.misses + sum(ahead)) * SIZE == counts.bytes_read
            assert counts.failed == 0
            assert sum(ahead) > 0 or not options.get("prefetch") or pool is engine.pools[0]
            assert all(few <= many for few, many in zip(used, ahead, strict=True))
            if slots == LEAST:
                assert counts.evictions > 0
            elif slots == PAGES * HEADS:
                assert counts.evictions == 0


@pytest.fixture(params=["host", "disk"])
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ColdStore, torch.Tensor]:
    return made_store(request.param, tmp_path_factory.mktemp("cold"))


def test_what_was_used_last_stays(stored: tuple[ColdStore, torch.Tensor]) -> None:
    engine = Engine(stored, LEAST, seed=1)
    counts = engine.pools[0].counts
    engine.attend([[0, 1, 2, 3, 4, 5]])
    engine.attend([[0, 1]])
    before = counts.misses
    engine.attend([[6, 7, 8, 9]])  # 2, 3, 4 and 5 give way
    engine.attend([[0, 1]])
    assert counts.misses == before + 4 * HEADS
    engine.attend([[2]])
    assert counts.misses == before + 5 * HEADS


def test_a_page_that_goes_on_keeps_its_slot(stored: tuple[ColdStore, torch.Tensor]) -> None:
    """And is no miss; one that begins anew is."""
    engine = Engine(stored, 3 * LEAST, seed=5)
    engine.attend([[0, 1, 2]])
    before = engine.pools[0].counts.misses
    for first, misses in ((1, 0), (0, HEADS)):
        engine.written = Written.of(torch.tensor([PAGE + first]), PAGE)
        engine.write(0, [1], [PAGE + first])
        engine.attend([[0, 1, 2]])
        assert engine.pools[0].counts.misses == before + misses


def test_windows_that_do_not_fit_together_take_turns(
    stored: tuple[ColdStore, torch.Tensor],
) -> None:
    engine = Engine(stored, LEAST, seed=2)
    apart = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13]]
    assert engine.attend(apart) == 3
    assert engine.attend([[0, 1, 2], [2, 1, 0], [3, 4, 5]]) == 1, "they share pages"


def test_a_pool_that_is_too_small_is_a_bug(stored: tuple[ColdStore, torch.Tensor]) -> None:
    engine = Engine(stored, LEAST - 1, seed=3)
    with pytest.raises(AssertionError, match="smaller than one window"):
        engine.attend([[0, 1, 2, 3, 4, 5]])


def test_an_unreadable_page_is_told_and_not_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    store, caches = made_store("disk", tmp_path_factory.mktemp("cold"))
    engine = Engine((store, caches), 3 * LEAST, seed=4)
    pool = engine.pools[1]
    assert store.fd is not None
    # Ends in the middle of page 20's second head; memory still has what was mapped before.
    os.ftruncate(store.fd, NBYTES + 20 * HEADS * SIZE + SIZE + SIZE // 2)
    table = np.array([[19, 20, 21]] * HEADS, np.int32) * HEADS
    table += np.arange(HEADS, dtype=np.int32)[:, None]
    lengths = np.full(HEADS, 3 * PAGE, np.int32)
    for _ in pool.turns(table, lengths, np.zeros_like(table), NOTHING):
        pass
    assert pool.counts.failed == 3
    assert pool.take_unreadable() == {20, 21}
    assert pool.take_unreadable() == set()
    os.ftruncate(store.fd, 2 * NBYTES)


def test_sizes() -> None:
    assert slots_for(1.0, 4, 2**14) == 2**14
    assert slots_for(0.5, 3, 2**14) == 2**15 // 3


def test_a_second_engine_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cold")
    first = made_store("disk", folder)
    with pytest.raises(KvplugError, match="in use by another engine"):
        made_store("disk", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["0.kvplug.lock"], (
        "the file has no name"
    )
    del first
