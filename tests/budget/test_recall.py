"""Recall budget: the fewest pages that hold the target, carried from window to window."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.budget.recall import LEAST, fewest, needs_reference
from kvplug.errors import KvplugError
from kvplug.policies import check
from tests.cases import PolicyCase
from tests.made_up import Piece, World


@pytest.mark.parametrize(
    ("scores", "shares", "target", "expected"),
    [
        pytest.param([3, 2, 1], [0.6, 0.2, 0.1], 0.89, 2, id="0.1 elsewhere, 0.6 and 0.2"),
        pytest.param([1, 2, 3], [0.6, 0.2, 0.1], 0.89, 3, id="ranked badly: all of them"),
        pytest.param([3, 2, 1], [0.0, 0.0, 0.0], 0.99, 0, id="everything is elsewhere"),
        pytest.param([3, 2, 1], [0.5, 0.4, 0.1], 1.0, 3, id="nothing may be left out"),
        pytest.param([3, 2, 1], [0.5, 0.4, 0.0], 1.0, 2, id="but what weighs nothing"),
        pytest.param([1, 1, 1], [0.0, 0.0, 1.0], 0.5, 1, id="of equals the newest first"),
        pytest.param([1, 1, 1], [1.0, 0.0, 0.0], 0.5, 3, id="and the oldest last"),
        pytest.param([np.nan, 1, np.inf], [0.2, 0.5, 0.3], 0.7, 2, id="no numbers come last"),
    ],
)
def test_fewest_by_hand(
    scores: list[float], shares: list[float], target: float, expected: int
) -> None:
    found = fewest(torch.tensor(scores), torch.tensor(shares, dtype=torch.float64), target)
    assert found == expected


@given(st.integers(1, 40), st.floats(0.05, 1.0), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_fewest_is_enough_and_no_page_too_many(pages: int, target: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(pages + 1, generator=generator, dtype=torch.float64)
    shares, always = (shares / shares.sum())[:-1], float(shares[-1] / shares.sum())
    scores = torch.rand(pages, generator=generator)
    found = fewest(scores, shares, target)
    order = scores.argsort(descending=True)
    held = [always + float(shares[order[:k]].sum()) for k in range(pages + 1)]
    assert held[found] >= target - 1e-9
    assert found == 0 or held[found - 1] < target + 1e-9


OPTIONS: dict[str, Any] = {
    "sink": 8, "local": 16, "window": 16, "dense_below": 100, "budget": 200,
}  # fmt: skip
BUDGET = 25


def world(**budget: Any) -> World:
    case = PolicyCase("quest", {"budget": {"name": "recall", "margin": 1.0, **budget}})
    return World(case, OPTIONS)


def selected(made: World, piece: Piece) -> list[int]:
    """Pages selected by each KV head of a step's last window, sinks and local ones not counted."""
    attended = made.run([piece], cached=False)[piece.request, piece.stop - 1]
    assert attended is not None
    local = -(-attended.end // 8) - max(attended.first + 1 - 16, 0) // 8
    return [len(pages) - 1 - local for pages in attended.pages]


def test_windows_get_what_audits_of_their_request_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the reference, with audits that find what the test says."""
    from kvplug.budget import recall

    # Of the windows that are sparse, 14 and on, every fourth is audited.
    audits = {16: (22, 3, 9), 20: (7, 20, 4), 24: (9, 6, 90), 28: (5, 6, 4)}
    finds = iter(audits.values())
    monkeypatch.setattr(recall._Bound, "_needed", lambda *a: next(finds))
    made = world(every=4)
    made.prefill(1, 320)
    found = [selected(made, Piece(1, 16 * n, 16, True)) for n in range(20, 30)]
    for head in range(3):
        needs = needs_reference(
            [audits[n][head] if n in audits else None for n in range(14, 30)], BUDGET
        )[6:]
        wanted = [BUDGET if n is None else min(max(int(np.ceil(n)), LEAST), BUDGET) for n in needs]
        assert [row[head] for row in found] == wanted


def test_before_the_first_audit_windows_have_the_budget() -> None:
    """And a decoded token of a window that began dense has too."""
    made = world(every=1000)
    made.prefill(1, 480)
    assert selected(made, Piece(1, 480, 16, True)) == [BUDGET] * 3


def test_the_target_is_held_where_it_is_audited() -> None:
    """A budget of everything: each audited window holds its target, and higher costs more."""
    from kvplug.observe.mass_meter import MassMeter
    from tests.made_up import reader_of

    pages = []
    for target in (0.2, 0.4, 0.6):
        made = World(
            PolicyCase("quest", {"budget": {"name": "recall", "target": target, "every": 1}}),
            {**OPTIONS, "budget": 280},
        )
        piece = Piece(2, 384, 64, True)
        plan = made.plan([piece])
        assert plan is not None
        made.attend([piece], plan)
        meter = MassMeter(reader_of(made.cache), 0.25, 0.0, since=0)
        meter(made.queries([piece]), plan)
        assert min(mass.captured for mass in meter.measured) >= target - 1e-6
        assert plan.table is not None
        pages.append(int(plan.table.seq_lens.sum()))
    assert pages == sorted(pages)
    assert pages[0] < pages[-1]


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ({"target": 0.0}, "0 < target <= 1"),
        ({"target": 1.01}, "0 < target <= 1"),
        ({"every": 0}, "every >= 1"),
        ({"margin": 0.5}, "1 <= margin <= 100"),
    ],
)
def test_nonsense_is_refused(budget: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KvplugError, match=sentence):
        check({"policy": "quest", "options": {"budget": {"name": "recall", **budget}}})


def test_it_needs_a_selector_that_takes_the_best() -> None:
    with pytest.raises(KvplugError, match="takes pages in the order of their scores"):
        check({"policy": "hax", "options": {"budget": "recall"}})
