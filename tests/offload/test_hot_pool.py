"""Whatever is written and asked for, in any order, slots hold what the cold store holds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kvplug.config import OffloadConfig
from kvplug.errors import KvplugError
from kvplug.offload.cold_store import ColdStore
from kvplug.offload.hot_pool import HotPool, slots_for
from kvplug.offload.written import Written

PAGES, HEADS, PAGE, DIM = 40, 2, 32, 8
WIDTH = 6
LEAST = WIDTH * HEADS
SHAPE = (PAGES, HEADS, PAGE, 2 * DIM)
NOTHING = Written.of(torch.tensor([-1]), PAGE)
NBYTES = PAGES * HEADS * PAGE * 2 * DIM * 2


def made_store(tier: str, folder: Path) -> tuple[ColdStore, torch.Tensor]:
    """A store of two layers, and the second one's cache."""
    path = str(folder) if tier == "disk" else None
    store = ColdStore(OffloadConfig.model_validate({"tier": tier, "path": path}), 0)
    both = store.allocate(2 * NBYTES).view(torch.bfloat16).view(2, *SHAPE)
    return store, both[1]


@pytest.fixture(params=["host", "disk"])
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ColdStore, torch.Tensor]:
    return made_store(request.param, tmp_path_factory.mktemp("cold"))


class Engine:
    """Writes pages and attends to rows at random, as an engine does, and checks every slot.

    Args:
        stored: A store and a layer's cache in it.
        slots: Of the pool.
        seed: Of everything.
        by_mass: Whether pages give way by mass.
    """

    def __init__(
        self, stored: tuple[ColdStore, torch.Tensor], slots: int, seed: int, by_mass: bool = False
    ) -> None:
        self.store, self.cache = stored
        self.pool = HotPool(self.cache, self.store, slots, by_mass)
        self.by_mass = by_mass
        self.draw = np.random.default_rng(seed)
        self.truth = self.cache.clone()
        self.written = NOTHING

    def write(self, pages: list[int]) -> None:
        """Some tokens of some pages get new keys."""
        slots = []
        for page in pages:
            first, count = int(self.draw.integers(0, PAGE)), int(self.draw.integers(1, PAGE + 1))
            tokens = range(first, min(first + count, PAGE))
            content = torch.from_numpy(self.draw.standard_normal((HEADS, len(tokens), 2 * DIM)))
            self.cache[page, :, tokens.start : tokens.stop] = content.to(self.cache.dtype)
            self.truth[page, :, tokens.start : tokens.stop] = content.to(self.cache.dtype)
            slots += [page * PAGE + token for token in tokens]
        self.written = Written.of(torch.tensor([*slots, -1]), PAGE)

    def attend(self, windows: list[list[int]]) -> int:
        """Rows of pages for every window and head; each head sees them in an order of its own."""
        table = np.zeros((len(windows) * HEADS, WIDTH), np.int32)
        lengths = np.zeros(len(table), np.int32)
        for w, pages in enumerate(windows):
            for head in range(HEADS):
                row = np.array(pages)[self.draw.permutation(len(pages))]
                table[w * HEADS + head, : len(pages)] = row * HEADS + head
                lengths[w * HEADS + head] = len(pages) * PAGE - int(self.draw.integers(0, PAGE))
        turns, done = 0, 0
        slots, shares = np.zeros_like(table), None
        if self.by_mass:
            shares = self.draw.random(table.shape).astype(np.float32)
        for first, last in self.pool.turns(table, lengths, slots, self.written, shares):
            assert first == done
            done, turns = last, turns + 1
            self.check(table, lengths, slots, range(first * HEADS, done * HEADS))
        assert done == len(windows)
        return turns

    def check(self, table: np.ndarray, lengths: np.ndarray, slots: np.ndarray, rows: range) -> None:
        """Every slot of the turn holds its page."""
        truth = self.truth.flatten(0, 1)
        for row in rows:
            count = -(-int(lengths[row]) // PAGE)
            held = self.pool.pages[slots[row, :count], 0]
            assert torch.equal(held, truth[table[row, :count]])

    def step(self) -> None:
        """One random step."""
        self.write(self.draw.choice(PAGES, int(self.draw.integers(0, 4)), replace=False).tolist())
        windows = [
            self.draw.choice(PAGES, int(self.draw.integers(1, WIDTH + 1)), replace=False).tolist()
            for _ in range(int(self.draw.integers(1, 4)))
        ]
        if self.draw.random() < 0.3:
            self.pool.rewrite(self.written)  # a dense step
        else:
            self.attend(windows)
        assert self.pool.check_integrity()


@pytest.mark.parametrize("by_mass", [False, True], ids=["lru", "mass"])
@pytest.mark.parametrize("slots", [LEAST, LEAST + 1, 3 * LEAST, PAGES * HEADS])
def test_random_steps(stored: tuple[ColdStore, torch.Tensor], slots: int, by_mass: bool) -> None:
    engine = Engine(stored, slots, slots, by_mass)
    for _ in range(250):
        engine.step()
    counts = engine.pool.counts
    assert counts.misses * PAGE * 2 * DIM * 2 == counts.bytes_read
    assert counts.failed == 0
    assert (counts.evictions > 0) == (slots < PAGES * HEADS)


def test_what_was_used_last_stays(stored: tuple[ColdStore, torch.Tensor]) -> None:
    engine = Engine(stored, LEAST, seed=1)
    engine.attend([[0, 1, 2, 3, 4, 5]])
    engine.attend([[0, 1]])
    before = engine.pool.counts.misses
    engine.attend([[6, 7, 8, 9]])  # 2, 3, 4 and 5 give way
    engine.attend([[0, 1]])
    assert engine.pool.counts.misses == before + 4 * HEADS
    engine.attend([[2]])
    assert engine.pool.counts.misses == before + 5 * HEADS


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
    store, cache = made_store("disk", tmp_path_factory.mktemp("cold"))
    engine = Engine((store, cache), 3 * LEAST, seed=4)
    engine.write(list(range(PAGES)))
    engine.write([])
    engine.pool.rewrite(engine.written)
    assert store.fd is not None
    # Ends in the middle of page 20's second head; memory still has what was mapped before.
    size = engine.pool.pages[0].nbytes
    os.ftruncate(store.fd, NBYTES + 20 * HEADS * size + size + size // 2)
    table = np.array([[19, 20, 21]] * HEADS, np.int32) * HEADS
    table += np.arange(HEADS, dtype=np.int32)[:, None]
    lengths = np.full(HEADS, 3 * PAGE, np.int32)
    for _ in engine.pool.turns(table, lengths, np.zeros_like(table), NOTHING):
        pass
    assert engine.pool.counts.failed == 3
    assert engine.pool.take_unreadable() == {20, 21}
    assert engine.pool.take_unreadable() == set()
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
