"""Prefix hits of an engine that serves kvplug end at whole, finished windows; others' stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvplug.patches import whole_hits

BLOCK = 64


class Manager:
    """A cache manager as vLLM's is, where the patch touches it: 10 blocks are cached."""

    def __init__(self, cached: int = 10) -> None:
        self.cached = cached
        self.block_pool = SimpleNamespace(hash_block_size=BLOCK)
        self.coordinator = SimpleNamespace(find_longest_cache_hit=self.find)

    def find(self, hashes: list[int], longest: int) -> tuple[tuple[list[int]], int, int]:
        blocks = min(self.cached, longest // BLOCK)
        return (hashes[:blocks],), blocks * BLOCK, 0

    def create_kv_cache_blocks(self, blocks: tuple[list[int]]) -> tuple[list[int]]:
        return blocks

    def get_computed_blocks(self, request: Any) -> tuple[Any, int, int]:
        found, tokens, _ = self.find(request.block_hashes, request.num_tokens - 1)
        return found, tokens, 7


REQUEST = SimpleNamespace(block_hashes=list(range(30)), num_tokens=1900)
get_computed_blocks = whole_hits._wrap(Manager.get_computed_blocks)


def serving(window: int, margin: int = 0, **manager: Any) -> Any:
    made = Manager(**manager)
    setattr(made, whole_hits.WINDOW, window)
    setattr(made, whole_hits.MARGIN, margin)
    return made


@pytest.mark.parametrize(("window", "blocks"), [(64, 10), (128, 10), (256, 8), (192, 9), (6400, 0)])
def test_hits_end_at_windows(window: int, blocks: int) -> None:
    found, tokens, _ = get_computed_blocks(serving(window), REQUEST)
    assert (found, tokens) == ((list(range(blocks)),), blocks * BLOCK)
    assert tokens % window == 0


def test_pages_are_found_by_the_text_up_to_where_they_are_finished() -> None:
    found, tokens, _ = get_computed_blocks(serving(128, 2 * BLOCK), REQUEST)
    assert (found, tokens) == ((list(range(2, 12)),), 10 * BLOCK)


def test_groups_that_make_a_hit_shorter_still() -> None:
    """With a sliding window, blocks 6 and 7 may be gone where 8 to 10 are there."""
    made = serving(256)

    def find(hashes: list[int], longest: int) -> tuple[tuple[list[int]], int, int]:
        blocks = min(10, longest // BLOCK)
        blocks = 5 if 5 < blocks < 10 else blocks
        return (hashes[:blocks],), blocks * BLOCK, 0

    made.coordinator.find_longest_cache_hit = made.find = find
    assert get_computed_blocks(made, REQUEST)[1] == 256


def test_no_hit_stays_none() -> None:
    assert get_computed_blocks(serving(128, cached=0), REQUEST) == (([],), 0, 7)


def test_others_are_left_alone() -> None:
    manager = Manager()
    assert get_computed_blocks(manager, REQUEST) == manager.get_computed_blocks(REQUEST)


@pytest.mark.parametrize(
    ("window", "margin", "computed", "cached"),
    [(None, 0, 300, 300), (256, 0, 300, 256), (256, 0, 256, 256), (256, 0, 255, 0),
     (64, 0, 700, 640), (64, 64, 700, 576), (256, 512, 1024, 512), (256, 512, 1023, 256),
     (256, 512, 300, 0)],
)  # fmt: skip
def test_finished_windows_are_cached_in_one_piece(
    window: int | None, margin: int, computed: int, cached: int
) -> None:
    found = []

    class Coordinator:
        block_pool = SimpleNamespace(hash_block_size=BLOCK)

        def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
            found.append((request.block_hashes[0], request.num_tokens, num_computed_tokens))

    coordinator = Coordinator()
    if window is not None:
        setattr(coordinator, whole_hits.WINDOW, window)
        setattr(coordinator, whole_hits.MARGIN, margin)
    whole_hits._wrap_cache(Coordinator.cache_blocks)(coordinator, REQUEST, computed)
    assert found == [(margin // BLOCK, 1900, cached)]
