"""NaN and infinity in queries or keys: a legal selection, the newest pages, a count, no crash."""

from __future__ import annotations

import math

import pytest
import torch

from kvplug.policies import make_stages
from tests.cases import PolicyCase, policy_params
from tests.made_up import HEAD_DIM, Attended, Piece, World
from tests.policies.test_contract import OPTIONS, PAGE, SINKS, far_of

PIECES = [Piece(1, 256, 64, True), Piece(2, 480, 37, True), Piece(3, 333, 1, False)]


def ranks_by_value(case: PolicyCase) -> bool:
    """Whether scores are sums of products; hashes of NaN are bits like any other."""
    index = make_stages(case.name, case.options).index
    return index is not None and "logits" in index.gives


@pytest.mark.parametrize("case", policy_params(retrieving=True))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_queries_that_are_no_numbers(case: PolicyCase, value: float) -> None:
    made = World(case, OPTIONS, PAGE)
    plan = made.plan(PIECES)
    assert plan is not None
    before = made.pipeline.counts.unranked_rows
    made.attend(PIECES, plan, sign=value)
    for attended in dict(made.read(PIECES, plan)).values():
        assert isinstance(attended, Attended)
        far = far_of(attended.first)
        local = tuple(range(far.stop, -(-attended.end // PAGE)))
        for row in attended.pages:
            selected = row[SINKS : len(row) - len(local)]
            assert row == (*range(SINKS), *selected, *local)
            assert list(selected) == sorted(set(selected))
            assert set(selected) <= set(far)
            if math.isnan(value) and ranks_by_value(case):
                assert selected == tuple(far)[len(far) - len(selected) :]
    if ranks_by_value(case) and math.isnan(value):
        rows = len(plan.step.sparse_windows) * made.num_kv_heads
        assert made.pipeline.counts.unranked_rows - before == rows


@pytest.mark.parametrize("case", policy_params(retrieving=True))
def test_one_bad_key_costs_its_own_page_only(case: PolicyCase) -> None:
    """Other requests, and other pages of the same one, are chosen as ever."""
    clean = World(case, OPTIONS, PAGE).run(PIECES)
    made = World(case, OPTIONS, PAGE)
    plan = made.plan(PIECES)
    assert plan is not None
    made._store(torch.full((1, 3, HEAD_DIM), torch.nan), made.slots(1, 100, 101))
    made.attend(PIECES, plan)
    for (request, position), attended in made.read(PIECES, plan):
        assert isinstance(attended, Attended)
        if request != 1:
            assert attended == clean[request, position]
        for row in attended.pages:
            assert len(set(row)) == len(row)
            assert -1 not in row
