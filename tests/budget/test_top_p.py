"""Top-p budget: the fewest pages that hold the mass, found without a sort."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.budget.top_p import TopPBudget, fewest_reference
from kvplug.errors import KvplugError
from kvplug.policies import check
from kvplug.workspace import Workspace
from tests.made_up import layer_of
from tests.steps import Far, counts_of, step_of

NAN, INF = math.nan, math.inf


def counts(scores: torch.Tensor, budget: int, p: float, temperature: float = 1.0) -> torch.Tensor:
    """``[Hk]`` of one window's scores ``[Hk, N]``."""
    heads, pages = scores.shape
    step = step_of([Far(0, 3, 3 + pages, budget)])
    found = counts_of(step, heads)
    budgeted = TopPBudget(p, temperature).for_layer(layer_of())
    budgeted.count(scores.float()[None].clone(), torch.empty(0), step, found, Workspace())
    return found[0]


def row(scores: list[float], p: float, budget: int = 99) -> int:
    """Of one row of logits."""
    return int(counts(torch.tensor([scores]), budget, p))


def logs(*masses: float) -> list[float]:
    """Logits of pages with these masses."""
    return [math.log(mass) for mass in masses]


@pytest.mark.parametrize(
    ("masses", "p", "expected"),
    [
        pytest.param([0.6, 0.3, 0.1], 0.5, 1, id="the best alone"),
        pytest.param([0.3, 0.1, 0.6], 0.61, 2, id="two"),
        pytest.param([0.1, 0.6, 0.3], 0.89, 2, id="not quite three"),
        pytest.param([0.1, 0.6, 0.3], 0.91, 3, id="all"),
        pytest.param([0.25] * 4, 0.26, 2, id="ties count one by one"),
        pytest.param([0.25] * 4, 0.74, 3, id="three of four alike"),
        pytest.param([0.5, 0.125, 0.125, 0.125, 0.125], 0.7, 3, id="ties behind the best"),
        pytest.param([0.9, 0.1], 1e-9, 1, id="at least one"),
        pytest.param([1.0], 0.99, 1, id="one page"),
    ],
)
def test_by_hand(masses: list[float], p: float, expected: int) -> None:
    assert row(logs(*masses), p) == expected


@given(
    st.lists(st.integers(-400, 400), min_size=1, max_size=60), st.floats(0.01, 0.99),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_fewest_that_hold_the_mass(tenths: list[int], p: float) -> None:
    """They hold it, and one page less does not, whatever the ties; rounding aside."""
    logits = [tenth / 10 for tenth in tenths]
    best = torch.tensor(logits).double().softmax(0).sort(descending=True).values
    count = row(logits, p)
    assert best[:count].sum() >= p - 1e-5
    assert best[: count - 1].sum() < p + 1e-5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.85, 0.99])
@pytest.mark.parametrize("pages", [1, 2, 100, 5000])
@pytest.mark.parametrize("spread", [0.1, 3.0, 50.0])
def test_twin(pages: int, p: float, spread: float) -> None:
    """Where float32 sums of thousands of pages fall on the same side."""
    scores = torch.randn(8, pages) * spread + 1000
    found, expected = counts(scores, pages, p), fewest_reference(scores, p)
    assert (found - expected).abs().max() <= (1 if pages > 1000 else 0)


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_the_budget_caps_it(budget: int) -> None:
    """Flat scores need many pages, sharp ones few."""
    flat, sharp = torch.randn(100) * 0.1, torch.zeros(100)
    sharp[[3, 50]] = 200.0
    assert counts(torch.stack([flat, sharp]), budget, 0.85).tolist() == [budget, min(2, budget)]


def test_p_of_one_is_the_fixed_budget() -> None:
    """Also where all but one page weigh nothing."""
    scores = torch.randn(2, 100)
    scores[1, 17] = 1e6
    assert counts(scores, 64, 1.0).tolist() == [64, 64]


def test_temperature_divides() -> None:
    scores = torch.randn(4, 300) * 9
    for temperature in (0.25, 4.0):
        expected = counts(scores / temperature, 300, 0.85)
        assert torch.equal(counts(scores, 300, 0.85, temperature), expected)
    assert counts(scores, 300, 0.85, 0.25).max() < counts(scores, 300, 0.85, 4.0).min()


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([NAN, 1.0, NAN], 1),
        ([INF, 0.0, 0.0, -INF], 2),
        ([NAN, NAN, NAN], 3),
        ([-INF, INF], 2),
        ([3e38, -3e38, 3e38], 2),
    ],
    ids=str,
)
def test_bad_scores_weigh_nothing(scores: list[float], expected: int) -> None:
    """Where nothing weighs anything, the budget stays."""
    assert int(counts(torch.tensor([scores]), len(scores), 0.8)) == expected


def test_each_window_and_head_has_its_own() -> None:
    """Entries behind a window's pages are no pages, and dense windows have no counts."""
    far = [Far(0, 2, 9, 5), Far(1, 0, 0, 0, sparse=False), Far(1, 0, 40, 30)]
    scores = torch.randn(2, 3, 40) * 20
    scores[0, :, 7:] = 1e9
    step = step_of(far)
    found = counts_of(step, 3)
    TopPBudget(0.7).for_layer(layer_of()).count(scores, torch.empty(0), step, found, Workspace())
    for w, (pages, budget) in enumerate(((7, 5), (40, 30))):
        expected = fewest_reference(scores[w, :, :pages], 0.7).clamp(max=budget)
        assert torch.equal(found[w].long(), expected)
    assert len({tuple(row) for row in found.tolist()}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, r"0 < p <= 1, not 0\.0\.$"),
        ({"p": 1.01}, r"0 < p <= 1, not 1\.01\.$"),
        ({"p": NAN}, r"not nan\.$"),
        ({"temperature": 0.0}, r"0\.01 <= temperature <= 100, not 0\.0\.$"),
        ({"q": 1.0}, r"Unknown option 'q' of budget 'top_p'"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KvplugError, match=message):
        check({"policy": "quest", "options": {"budget": {"name": "top_p", **options}}})


def test_scores_must_be_logits() -> None:
    with pytest.raises(KvplugError, match=r"[Bb]udget 'top_p' needs scores .*logits to know"):
        check({"policy": "simhash", "options": {"budget": "top_p"}})
