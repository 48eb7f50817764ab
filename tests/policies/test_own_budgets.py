"""Requests that ask for budgets of their own: each as if the engine had it, in any batch."""

from __future__ import annotations

import pytest

from kvplug.windows import EVERYTHING
from tests.cases import PolicyCase, policy_params
from tests.made_up import MAX_CONTEXT
from tests.policies.test_contract import BUDGET, MIXED, PAGE, world


@pytest.mark.parametrize("case", policy_params(retrieving=True))
def test_requests_may_have_budgets_of_their_own(case: PolicyCase) -> None:
    """Each gets what an engine with its budget would give it, whatever shares the batch."""
    asked = {1: 3, 3: EVERYTHING, 4: 9, 8: 1}
    made = world(case)
    made.asked = asked
    together = made.run(MIXED)
    for piece in MIXED:
        pages = min(asked.get(piece.request, BUDGET), MAX_CONTEXT // PAGE)
        alone = world(case, budget=pages * PAGE).run([piece])
        assert alone == {key: together[key] for key in alone}, piece


def test_requests_may_have_recall_targets_of_their_own() -> None:
    """Each gets what an engine with its target would give it."""
    targets = {1: 0.2, 2: 0.9}
    made = world(recalling(0.5))
    made.targets = targets
    together = made.run(MIXED)
    for piece in MIXED:
        alone = world(recalling(targets.get(piece.request, 0.5))).run([piece])
        assert alone == {key: together[key] for key in alone}, piece
    assert together != world(recalling(0.5)).run(MIXED)


def recalling(target: float) -> PolicyCase:
    """A recipe with a recall budget that audits every window."""
    budget = {"name": "recall", "target": target, "every": 1, "margin": 1.0}
    return PolicyCase("quest", {"budget": budget}, varies=True)
