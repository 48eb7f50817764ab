"""What waits while a batch decodes short contexts is told in time: nothing it changes is missed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvplug.pending import CAPACITY, PendingSteps
from kvplug.windows import Batch
from tests.cases import PolicyCase, policy_params
from tests.made_up import Attended, Piece, World
from tests.policies.test_contract import OPTIONS, PAGE, WINDOW, states

LONG_DENSE = {**OPTIONS, "dense_below": 200}


def served(made: World, *, waits: bool) -> list[dict[tuple[int, int], Attended | None]]:
    """Two requests decode past ``dense_below``; a third comes on pages that another gave back."""
    if not waits:
        made.pipeline.pending.add = lambda batch: None  # type: ignore[method-assign]
    for request, stop in ((1, 60), (2, 171), (3, 33)):
        made.prefill(request, stop)
    chosen = []
    for step in range(45):
        batch = [Piece(1, 60 + step, 1, False), Piece(2, 171 + step, 1, False)]
        if step < 9:
            batch.append(Piece(3, 33 + step, 1, False))
        chosen.append(made.run(batch, cached=False))
        if step == 8:  # its pages go to a request that arrives at once
            made._free += made.pages_of.pop(3)[::-1]
            chosen += [made.run([Piece(4, at, WINDOW, True)], cached=False) for at in (0, WINDOW)]
    for at in range(105, 260):
        chosen.append(made.run([Piece(1, at, 1, False)], cached=False))
    return chosen


@pytest.mark.parametrize("case", policy_params(retrieving=True))
def test_waiting_changes_nothing(case: PolicyCase) -> None:
    waiting, prompt = World(case, LONG_DENSE, PAGE), World(case, LONG_DENSE, PAGE)
    chosen = served(waiting, waits=True)
    assert chosen == served(prompt, waits=False)
    assert sum(a is not None for step in chosen for a in step.values()) > 50
    assert waiting.layer is not None
    assert prompt.layer is not None
    assert torch.equal(states(waiting.layer), states(prompt.layer))


@pytest.mark.parametrize("case", policy_params(retrieving=True))
def test_it_does_wait(case: PolicyCase) -> None:
    """Or the test above compares a thing with itself."""
    made = World(case, LONG_DENSE, PAGE)
    if not made.pipeline.watched:
        assert made.layer is not None
        assert made.layer.forgetters == [], "it learns of pages alone, when they are sealed"
        return
    made.prefill(1, 60)
    assert made.pipeline.pending.count == 0
    counts = []
    for at in range(60, 75):
        assert made.plan([Piece(1, at, 1, False)], cached=False) is None
        counts.append(made.pipeline.pending.count)
    assert counts == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]  # pages of 8 begin at 64, 72
    made.run([Piece(2, 0, WINDOW, True)], cached=False)
    assert made.pipeline.pending.count == 0


def pending(**changed: Any) -> PendingSteps:
    geometry = World(PolicyCase("quest", {}), LONG_DENSE, PAGE).pipeline.geometry
    return PendingSteps(geometry._replace(**changed))


def batch(requests: int, end: int, **changed: Any) -> Batch:
    fields = {
        "query_start": np.arange(requests + 1, dtype=np.int32),
        "seq_lens": np.full(requests, end, np.int32),
        "is_prefilling": np.zeros(requests, np.bool_),
        "block_table": np.zeros((requests, 30), np.int32),
        "slots": np.arange(requests),
    }
    return Batch(**{**fields, **changed})


def test_a_full_buffer_has_no_room() -> None:
    steps = pending()
    assert steps.add(batch(50, 60)) == slice(0, 50)
    assert steps.add(batch(50, 61)) == slice(50, 100)
    assert steps.add(batch(50, 62)) is None
    assert steps.add(batch(CAPACITY - 100, 62)) == slice(100, CAPACITY)
    assert len(steps.step().stream) == CAPACITY


def test_what_does_not_wait() -> None:
    steps = pending()
    two = np.array([0, 1, 3], np.int32)
    prefilling = np.array([False, True])
    for other in (
        batch(2, 201),
        batch(2, 60, query_start=two),
        batch(2, 60, is_prefilling=prefilling),
        batch(CAPACITY + 1, 60),
    ):
        assert steps.add(other) is None
    assert steps.add(batch(2, 57)) == slice(0, 2), "the first may begin a page"
    assert steps.add(batch(2, 65)) is None, "a later one may not"
    assert steps.add(batch(2, 200)) == slice(2, 4)
