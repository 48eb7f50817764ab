"""A recipe that learns from later queries gets shorter prefix hits; any other engine's stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvplug.patches import finished_hits

BLOCK = 64


class Manager:
    """A cache manager as vLLM's is, where the patch touches it: 10 blocks are cached."""

    def __init__(self, cached: int = 10) -> None:
        self.cached = cached
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
get_computed_blocks = finished_hits._wrap(Manager.get_computed_blocks)


@pytest.mark.parametrize(("margin", "blocks"), [(64, 9), (128, 8), (640, 0), (6400, 0)])
def test_hits_end_a_margin_earlier(margin: int, blocks: int) -> None:
    manager = Manager()
    setattr(manager, finished_hits.MARGIN, margin)
    assert get_computed_blocks(manager, REQUEST) == ((list(range(blocks)),), blocks * BLOCK, 0)


def test_no_hit_stays_none() -> None:
    manager = Manager(cached=0)
    setattr(manager, finished_hits.MARGIN, 128)
    assert get_computed_blocks(manager, REQUEST) == (([],), 0, 7)


@pytest.mark.parametrize("margin", [None, 0])
def test_others_are_left_alone(margin: int | None) -> None:
    manager = Manager()
    if margin is not None:
        setattr(manager, finished_hits.MARGIN, margin)
    assert get_computed_blocks(manager, REQUEST) == manager.get_computed_blocks(REQUEST)
