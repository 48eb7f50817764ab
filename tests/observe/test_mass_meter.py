"""Captured attention mass: known shares on a cache made by hand, a naive softmax on others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kvplug import exact_mass
from kvplug.exact_mass import Mass
from kvplug.observe.mass_meter import MassMeter
from kvplug.page_table import PageTable
from kvplug.pages import PageGeometry
from kvplug.pipeline import Plan
from kvplug.step import Step
from kvplug.windows import cut_windows
from kvplug.workspace import Workspace
from tests.cases import PolicyCase
from tests.made_up import Piece, World, reader_of

# Pages of 2 tokens; one decoded token at position 10, so 11 tokens in 6 pages, the last half full.
# Page 0 is the sink, page 5 local, pages 1 to 4 far; two of them are attended.
GEOMETRY = PageGeometry(
    page=2, window=2, sink_pages=1, local=1, budget_pages=2, dense_below=0, most_pages=2
)
PHYSICAL = [6, 2, 5, 1, 3, 7]
# Softmax numerators of each token, by KV head and query head of its group; they sum to 100.
WEIGHTS = [
    [
        [1, 1, 10, 10, 20, 20, 5, 5, 4, 4, 20],
        [2, 3, 30, 10, 1, 1, 20, 20, 2, 1, 10],
    ],
    [
        [90, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [10, 5, 5, 5, 5, 5, 5, 5, 25, 25, 5],
    ],
]
POISON = 9.0  # logit of what lies behind the context: e^9 would outweigh all of it


def hand_made() -> tuple[torch.Tensor, torch.Tensor, Step]:
    """Queries ``[1, 4, 2]``, a packed cache and the step.

    Query head ``g`` of a group is the unit vector ``g``, so number ``g`` of a key is its logit.
    """
    cache = torch.full((8, 2, 2, 2), POISON)  # [pages, Hk, D, P]
    for head, group in enumerate(WEIGHTS):
        for g, weights in enumerate(group):
            for token, weight in enumerate(weights):
                cache[PHYSICAL[token // 2], head, g, token % 2] = math.log(weight)
    step = Step(
        cut_windows(
            np.array([0, 1], np.int32), np.array([11], np.int32), np.array([False]), GEOMETRY
        ),
        torch.tensor([[*PHYSICAL, 0, 0]], dtype=torch.int32),
        2,
    )
    queries = torch.eye(2).repeat(2, 1)[None]
    return queries, cache.view(16, 2, 2).reshape(16, 1, 2, 2), step


def measure(selected: list[list[int]], **changed: Any) -> list[Mass]:
    """What the meter says of the hand-made step when each KV head selects these pages."""
    queries, cache, step = hand_made()
    table = PageTable(step, GEOMETRY, 2, Workspace())
    counts = torch.tensor([[len(pages) for pages in selected]], dtype=torch.int32)
    padded = [pages + [0] * (2 - len(pages)) for pages in selected]
    table.write_selected(torch.tensor([padded], dtype=torch.int32), counts, True)
    settings: dict[str, Any] = {"scale": 1.0, "softcap": 0.0, "since": 0, **changed}
    meter = MassMeter(reader_of(cache), **settings)
    meter(queries, Plan(step, torch.empty(0, dtype=torch.int64), table))
    return meter.measured


def test_known_shares() -> None:
    """Far pages have (20, 40, 10, 8) and (40, 2, 40, 3); (2, 2, 2, 2) and (10, 10, 10, 50).

    The best two pages of a KV head are those with the largest sum over its query heads: 1 and 3 of
    the first (60 and 50), 4 and any other of the second.
    """
    [found] = measure([[2, 4], [1, 4]])
    first = (2 + 20 + 40 + 8, 5 + 10 + 2 + 3)
    second = (91 + 1 + 2 + 2, 15 + 5 + 10 + 50)
    assert found.captured == pytest.approx(sum((*first, *second)) / 400)
    best = (2 + 20 + 20 + 10, 5 + 10 + 40 + 40, *second)
    assert found.best == pytest.approx(sum(best) / 400)


def test_the_best_choice_captures_the_best_share() -> None:
    [found] = measure([[1, 3], [2, 4]])
    # Pages 1 and 3 hold 60 and 50 of the group's 200, page 2 holds 42.
    assert found.captured == pytest.approx(found.best)


def test_heads_may_attend_to_different_numbers_of_pages() -> None:
    [found] = measure([[3], [1, 2]])
    captured = (2 + 20 + 10, 5 + 10 + 40, 91 + 1 + 4, 15 + 5 + 20)
    best = (2 + 20 + 20, 5 + 10 + 40, 91 + 1 + 4, 15 + 5 + 60)
    assert found.captured == pytest.approx(sum(captured) / 400)
    assert found.best == pytest.approx(sum(best) / 400)


def test_only_windows_from_a_token_on_are_measured() -> None:
    assert len(measure([[1, 2], [1, 2]], since=11)) == 1
    assert measure([[1, 2], [1, 2]], since=12) == []


def test_keys_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure([[2, 4], [1, 4]])
    monkeypatch.setattr(exact_mass, "READ_PAGES", 4)
    assert measure([[2, 4], [1, 4]]) == whole


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("policy", ["quest", "streaming"])
@pytest.mark.parametrize("budget", [8, 40])
def test_against_a_naive_softmax(policy: str, budget: int, softcap: float) -> None:
    """A batch with a prompt's last window, decoded tokens, and a dense request among them."""
    world = World(
        PolicyCase(policy, {}),
        {"budget": budget, "sink": 8, "local": 16, "window": 16, "dense_below": 40},
    )
    batch = [Piece(0, 128, 37, True), Piece(1, 250, 1, False), Piece(2, 20, 1, False)]
    plan = world.plan(batch)
    assert plan is not None
    assert plan.table is not None
    world.attend(batch, plan)
    # Only the prompt's last window and the decoded tokens: the prompt's others end before 165.
    meter = MassMeter(reader_of(world.cache), 0.25, softcap, since=165)
    meter(world.queries(batch), plan)
    assert len(meter.measured) == 2
    meter.since = 0
    meter.measured.clear()
    meter(world.queries(batch), plan)

    attended = dict(world.read(batch, plan))
    expected = [
        naive(world, request, position, attended[request, position], softcap)
        for request, position in ((0, 143), (0, 159), (0, 164), (1, 250), (2, 20))
    ]
    for found, captured in zip(meter.measured, expected, strict=True):
        assert found.captured == pytest.approx(captured, abs=1e-5)  # float32 logits up to 20
        assert captured - 1e-5 <= found.best <= 1 + 1e-9
    assert expected[-1] == pytest.approx(1)
    assert max(expected[:-1]) < 0.99


def naive(world: World, request: int, position: int, attended: Any, softcap: float) -> float:
    """Mean over query heads of the softmax mass on attended pages, of one query."""
    keys = world.keys(request)[: position + 1].double()
    query = world.queries([Piece(request, position, 1, False)])[0].double()
    shares = []
    for h in range(world.num_kv_heads * world.group):
        kv_head = h // world.group
        logits = 0.25 * keys[:, kv_head] @ query[h]
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.softmax(0)
        if attended is None:
            shares.append(float(weights.sum()))
            continue
        pages = torch.arange(position + 1) // world.page
        inside = torch.isin(pages, torch.tensor(attended.pages[kv_head]))
        shares.append(float(weights[inside].sum()))
    return sum(shares) / len(shares)
