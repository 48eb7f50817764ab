"""EM-LLM's own properties, through the whole pipeline: events come whole, with their neighbours."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.policies import make_stages
from kvplug.segment.base import EventStarts
from tests.cases import PolicyCase
from tests.made_up import Attended, Oracle, Piece, World

PAGE, WINDOW, SINKS, LENGTH = 8, 16, 2, 700
DECODED = Piece(1, LENGTH, 1, False)


def world(**options: Any) -> World:
    """Hashes find pages in it, so that what is retrieved varies by head."""
    regions = {"sink": 16, "local": 20, "budget": 64, "window": WINDOW, "dense_below": 64}
    return World(PolicyCase("emllm", {"index": "simhash", **options}), regions, PAGE)


def attended(made: World) -> list[list[int]]:
    """Far pages that each KV head of a decoded token attends to, of 8."""
    made.prefill(1, LENGTH)
    found = made.run([DECODED], cached=False)[1, LENGTH]
    assert isinstance(found, Attended)
    rows = [list(row[SINKS : SINKS + 8]) for row in found.pages]
    assert all(row == sorted(set(row)) for row in rows)
    return rows


def events(made: World, most: int) -> list[list[int]]:
    """The far pages of the request, event by event, from the marks on its pages."""
    starts = made.pipeline.common[EventStarts].state[0]
    far = range(SINKS, (LENGTH + 1 - 20) // PAGE)
    found: list[list[int]] = []
    for n in far:
        if not found or starts[made.pages_of[1][n]] or len(found[-1]) == most:
            found.append([])
        found[-1].append(n)
    return found


def test_events_come_whole() -> None:
    made = world(max_tokens=32, min_tokens=20, contiguity=0.0)
    rows = attended(made)
    cut = events(made, 4)
    assert len({len(event) for event in cut}) == 4
    long_ones = 0
    for row in rows:
        parts = [[n for n in event if n in row] for event in cut]
        touched = [(part, event) for part, event in zip(parts, cut, strict=True) if part]
        assert sum(part != event for part, event in touched) <= 1
        long_ones += sum(part == event and len(event) > 1 for part, event in touched)
    assert long_ones


def test_neighbours_come_with_them() -> None:
    """Of events of one page, 3 by score and the 5 next to them; alone, 8 by score."""
    scattered = attended(world(max_tokens=8, contiguity=0.0))
    together = attended(world(max_tokens=8, contiguity=0.7))

    def adjacent(rows: list[list[int]]) -> int:
        return sum(b - a == 1 for row in rows for a, b in pairwise(row))

    assert adjacent(together) >= 3 * 3
    assert adjacent(together) > adjacent(scattered)


@pytest.mark.parametrize("refine", ["none", "conductance"])
def test_without_surprise_events_are_uniform(refine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether nothing is surprising or nothing counts as such: InfLLM with longer blocks."""
    uniform = attended(world(segment={"name": "uniform", "max_tokens": 32}))
    assert attended(world(max_tokens=32)) != uniform
    assert attended(world(max_tokens=32, gamma=1e30, refine=refine)) == uniform
    monkeypatch.setattr(Oracle, "compute_logits", lambda _, hidden: torch.zeros(len(hidden), 11))
    assert attended(world(max_tokens=32, refine=refine)) == uniform


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": -1.0}, "gamma >= 0"),
        ({"contiguity": 1.0}, "contiguity < 1"),
        ({"refine": "modularit"}, "did you mean 'modularity'"),
        ({"min_tokens": 256}, "min_tokens <= max_tokens"),
        ({"top": 0}, "top >= 1"),
        ({"segment": None}, "needs a segment stage"),
        ({"select": "top"}, "'surprise' is of no use"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(KvplugError, match=words):
        make_stages("emllm", options)
