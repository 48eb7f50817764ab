"""Selector metrics on a hand-made cache, where the best pages and the exact output are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.evals.selector import Choice, SelectorMeter
from kvplug.page_reader import PageReader
from tests.cases import PolicyCase
from tests.made_up import Piece, World, reader_of

OPTIONS = {"budget": 16, "sink": 8, "local": 16, "window": 16, "dense_below": 40}


def attended(policy: str, budget: int) -> tuple[World, list[Piece], Any]:
    """A world of which a prompt's last window and a decoded token have selected pages."""
    world = World(PolicyCase(policy, {}), {**OPTIONS, "budget": budget})
    batch = [Piece(0, 128, 37, True), Piece(1, 250, 1, False)]
    plan = world.plan(batch)
    assert plan is not None
    world.attend(batch, plan)
    return world, batch, plan


def values_like_keys(world: World) -> PageReader:
    """Values that are the keys, token by token."""
    import numpy as np

    _, _, page, dim = world.cache.shape
    places = np.arange(page * dim, dtype=np.int32).reshape(dim, page).T.ravel()
    return PageReader(world.cache.flatten(1), np.ascontiguousarray(places), (page, dim), "values")


@pytest.mark.parametrize("policy", ["quest", "streaming"])
@pytest.mark.parametrize("budget", [16, 48])
def test_against_plain_attention(policy: str, budget: int) -> None:
    world, batch, plan = attended(policy, budget)
    meter = SelectorMeter(reader_of(world.cache), values_like_keys(world), 0.25, 0.0, since=165)
    meter(world.queries(batch), plan)
    seen = dict(world.read(batch, plan))
    for head in range(world.num_kv_heads):
        for number, (request, position) in enumerate(((0, 164), (1, 250))):
            mine = seen[request, position]
            assert mine is not None
            found = meter.choices[head][number]
            expected = naive(world, request, position, mine.pages[head], head)
            assert found.captured == pytest.approx(expected.captured, abs=1e-4)
            assert found.error == pytest.approx(expected.error, abs=1e-4)
            assert found.captured <= found.best + 1e-6
            assert 0 <= found.found <= 1
    assert meter.measured[0].captured == pytest.approx(
        sum(meter.choices[head][0].captured for head in range(world.num_kv_heads))
        / world.num_kv_heads
    )


def naive(world: World, request: int, position: int, pages: tuple[int, ...], head: int) -> Choice:
    """Captured mass and output error by plain attention in float64."""
    keys = world.keys(request)[: position + 1, head].double()
    query = world.queries([Piece(request, position, 1, False)])[0].double()
    inside = torch.isin(torch.arange(position + 1) // world.page, torch.tensor(pages))
    captured, error = [], []
    for h in range(head * world.group, (head + 1) * world.group):
        logits = 0.25 * keys @ query[h]
        exact = logits.softmax(0)
        selected = logits.masked_fill(~inside, -torch.inf).softmax(0)
        captured.append(float(exact[inside].sum()))
        error.append(float((selected @ keys - exact @ keys).norm() / (exact @ keys).norm()))
    return Choice(sum(captured) / len(captured), 1.0, 1.0, sum(error) / len(error))


def test_a_dense_window_has_no_error() -> None:
    """A short request beside sparse ones attends to everything."""
    world = World(PolicyCase("quest", {}), OPTIONS)
    batch = [Piece(1, 250, 1, False), Piece(2, 20, 1, False)]
    plan = world.plan(batch)
    assert plan is not None
    world.attend(batch, plan)
    meter = SelectorMeter(reader_of(world.cache), values_like_keys(world), 0.25, 0.0, since=0)
    meter(world.queries(batch), plan)
    for sparse, dense in meter.choices.values():
        assert dense == pytest.approx((1.0, 1.0, 1.0, 0.0), abs=1e-6)
        assert sparse.error > 1e-3


def test_means_are_by_head() -> None:
    meter = SelectorMeter.__new__(SelectorMeter)
    meter.choices = {1: [Choice(1, 1, 1, 0)], 0: [Choice(0, 1, 0, 1), Choice(1, 1, 0.5, 0)]}
    assert meter.means() == [Choice(0.5, 1, 0.25, 0.5), Choice(1, 1, 1, 0)]
