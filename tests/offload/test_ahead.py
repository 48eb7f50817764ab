"""What is read ahead is there when it is asked for, is never old, and fails nobody."""

from __future__ import annotations

import gc
import os
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from kvplug.offload.ahead import READER, ReadAhead
from kvplug.offload.written import Written
from tests.offload.test_hot_pool import HEADS, LEAST, PAGE, PAGES, Engine, made_store


@pytest.fixture(params=["host", "disk"])
def tier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def engine(
    tier: str, folders: pytest.TempPathFactory, *prefetch: str, slots: int = 4 * LEAST, **more: Any
) -> Engine:
    """With every page in it."""
    options = {"prefetch": list(prefetch), **more}
    made = Engine(made_store(tier, folders.mktemp("cold"), **options), slots, seed=1)
    for layer in range(2):
        made.write(layer, [], range(PAGES * PAGE))  # type: ignore[arg-type]
    return made


def wait(made: Engine) -> None:
    """Until everything is read."""
    for pool in made.pools:
        assert pool._ahead is not None
        assert not pool._ahead._asked.marks[0] or pool._ahead._is_read.wait(60)


def test_the_next_layer_finds_its_pages(tier: str, tmp_path_factory: Any) -> None:
    made = engine(tier, tmp_path_factory, "next_layer")
    made.attend([[3, 4, 5], [4, 5, 6]], layer=0)
    wait(made)
    made.attend([[3, 4, 5], [4, 5, 6]], layer=1)
    counts = made.pools[1].counts
    assert (counts.misses, counts.hits) == (0, 4 * HEADS)
    assert (counts.prefetched_next_layer, counts.prefetch_hits_next_layer) == (4 * HEADS, 4 * HEADS)
    made.attend([[3]], layer=1)
    assert counts.prefetch_hits_next_layer == 4 * HEADS, "a page is found once"


def test_what_a_step_writes_is_not_read(tier: str, tmp_path_factory: Any) -> None:
    made = engine(tier, tmp_path_factory, "next_layer")
    made.written = Written.of(torch.tensor([4 * PAGE + 7]), PAGE)
    made.attend([[3, 4, 5]], layer=0)
    wait(made)
    made.pools[1].land()
    assert made.pools[1].counts.prefetched_next_layer == 2 * HEADS


def test_the_last_step_comes_back(tier: str, tmp_path_factory: Any) -> None:
    """Of windows that do not fit together, the first are what the next step begins with."""
    made = engine(tier, tmp_path_factory, "last", slots=2 * LEAST)
    apart = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    assert made.attend(apart) == 2
    wait(made)
    counts = made.pools[0].counts
    before = counts.misses
    assert made.attend([apart[0]]) == 1
    assert counts.prefetched_last == counts.prefetch_hits_last == LEAST // 2
    assert counts.misses == before + LEAST // 2


def test_no_window_loses_what_it_needs_before_the_one_that_gains(
    tier: str, tmp_path_factory: Any
) -> None:
    made = engine(tier, tmp_path_factory, "last", slots=LEAST)
    assert made.attend([[0, 1, 2, 3, 4, 5], [6, 7]]) == 2  # what is left is the first one's own
    wait(made)
    assert made.attend([[0, 1, 2, 3, 4, 5]]) == 1
    assert made.pools[0].counts.misses == LEAST + 4 * HEADS
    assert made.pools[0].counts.prefetched_last == 0


def test_neighbours(tier: str, tmp_path_factory: Any) -> None:
    made = engine(tier, tmp_path_factory, "events")
    links = made.links.arrays
    chain = [9, 20, 3, 17, 30]
    links.head[chain] = chain
    links.after[chain[:-1]], links.before[chain[1:]] = chain[1:], chain[:-1]
    made.attend([[3]])
    wait(made)
    made.attend([[20, 17]])
    counts = made.pools[0].counts
    assert counts.prefetched_events == counts.prefetch_hits_events == 2 * HEADS
    assert counts.misses == HEADS


def test_whole_events(tier: str, tmp_path_factory: Any) -> None:
    """The rest of the event, the event behind it and the one before it."""
    made = engine(tier, tmp_path_factory, "events")
    links = made.links.arrays
    events = [[1, 2], [5, 9, 8], [4, 7], [11]]
    chain = [page for event in events for page in event]
    for event in events:
        links.head[event] = event[0]
    links.after[chain[:-1]], links.before[chain[1:]] = chain[1:], chain[:-1]
    made.attend([[9]])
    wait(made)
    made.pools[0].land()
    held = np.flatnonzero(made.pools[0]._state.slot_of >= 0) // HEADS
    assert sorted(set(held.tolist())) == [1, 2, 4, 5, 7, 8, 9]


def test_what_was_not_read_in_time_is_given_up(
    tier: str, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(tier, tmp_path_factory, "next_layer", slots=LEAST)
    monkeypatch.setattr(READER, "submit", lambda work: None)
    made.attend([[0, 1, 2, 3, 4, 5]], layer=1)
    made.attend([[6, 7, 8, 9, 10, 11]], layer=0)
    made.attend([[0, 1, 2, 12, 13, 14]], layer=1)
    counts = made.pools[1].counts
    assert counts.prefetched_next_layer == 0
    assert made.pools[1].check_integrity()


def test_a_page_written_while_it_is_read(tier: str, tmp_path_factory: Any) -> None:
    """Whatever of it was read before: it follows, or goes."""
    for first in (0, 5):
        made = engine(tier, tmp_path_factory, "next_layer")
        made.attend([[3, 4, 5]], layer=0)
        wait(made)
        made.written = Written.of(torch.tensor([4 * PAGE + first]), PAGE)
        made.write(1, [4], [4 * PAGE + first])
        made.attend([[3, 4, 5]], layer=1)
        assert made.pools[1].counts.misses == (0 if first else HEADS)
        assert made.pools[1].check_integrity()


def test_a_page_that_cannot_be_read_ahead_fails_nobody(tmp_path_factory: Any) -> None:
    made = engine("disk", tmp_path_factory, "next_layer")
    store, broken = made.store, os.pipe()
    kept, store.fd = store.fd, broken[1]
    made.pools[0].store.fd = broken[1]
    made.pools[0].next = made.pools[1]
    made.written = Written.of(torch.tensor([3 * PAGE + 1, 4 * PAGE + 1]), PAGE)
    made.attend([[3, 4]], layer=0)  # just written: from memory
    made.written = Written.of(torch.tensor([-1]), PAGE)
    made.attend([[3, 4]], layer=0)
    wait(made)
    store.fd = kept
    made.attend([[3, 4]], layer=1)
    counts = made.pools[1].counts
    assert counts.failed == 2 * HEADS
    assert counts.misses == 2 * HEADS
    assert made.pools[1].take_unreadable() == set()


def test_memory_outlives_a_read(
    tier: str, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that ends does not take away what a thread is about to fill."""
    made, queue = engine(tier, tmp_path_factory, "next_layer"), list[ReadAhead]()
    monkeypatch.setattr(READER, "submit", queue.append)
    made.attend([[3, 4, 5]], layer=0)
    memory = weakref.ref(made.pools[1].pages)
    del made
    gc.collect()
    assert memory() is not None
    queue[0].read()
    assert queue[0]._is_read.is_set()


def test_a_running_read_stops(tier: str, tmp_path_factory: Any) -> None:
    """It is told to, and is waited for: nobody uses a slot that is being filled."""
    made = engine(tier, tmp_path_factory, "next_layer")
    for _ in range(30):
        made.attend([made.draw.choice(PAGES, 6, replace=False).tolist()], layer=0)
        made.attend([made.draw.choice(PAGES, 6, replace=False).tolist()], layer=1)
    assert made.pools[1].check_integrity()
