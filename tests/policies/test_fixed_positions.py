"""With fixed positions, stages see keys at 0 and queries at the fixed distance, under rule 4.

The rotary embedding turns by quarters, so that nothing is rounded and selections can be compared.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.windows import EVERYTHING
from tests.cases import PolicyCase
from tests.made_up import MAX_CONTEXT, Attended, Piece, World, quarter_turns

PAGE, WINDOW, LOCAL, DENSE_BELOW, PROMPT = 8, 16, 20, 100, 403
OPTIONS = {
    "sink": 10, "local": LOCAL, "budget": 46, "window": WINDOW, "dense_below": DENSE_BELOW,
}  # fmt: skip
BATCH = [
    Piece(1, 256, 64, True),
    Piece(2, 480, 37, True),  # the end of a prompt, inside a page
    Piece(3, 333, 1, False),
    Piece(4, 700, 5, False),
    Piece(5, 0, 48, True),  # stays dense
    Piece(7, 32, 160, True),  # becomes sparse half way
]
AT_ZERO = [
    PolicyCase("channels", {}),
    PolicyCase("simhash", {}),
    PolicyCase("quest", {}),
    PolicyCase("hcam", {}),
    PolicyCase("simhash", {"probe": ["activation", "last_activated"], "budget": "entropy"}),
    PolicyCase("quest", {"budget": {"name": "top_p", "p": 0.5, "temperature": 0.2}}),
]
LOCALLY = [
    PolicyCase("infllm", {}),
    PolicyCase("hax", {}),
    PolicyCase("actqkv", {}),
    PolicyCase("emllm", {"max_tokens": 32}),
]
"""Recipes that look at keys where they stand as well: at neighbours."""


class Turned(World):
    """Its contents are rotated by their positions, and its positions are fixed."""

    def _content(self, request: int, heads: int, salt: int) -> torch.Tensor:
        plain = super()._content(request, heads, salt)
        if salt == 3:
            return plain
        rotary, at = quarter_turns(), torch.arange(MAX_CONTEXT)[:, None]
        return rotary.apply(plain, rotary.turn(torch.tensor(0), at))


class Still(World):
    """The same, but for what the stages of the other are to see."""

    def _content(self, request: int, heads: int, salt: int) -> torch.Tensor:
        plain = super()._content(request, heads, salt)
        if salt != 2:
            return plain
        rotary = quarter_turns()
        return rotary.apply(plain, rotary.turn(torch.tensor(0), torch.tensor(LOCAL)))


def turned(case: PolicyCase, **changed: object) -> World:
    return Turned(case, {**OPTIONS, "positions": "fixed", **changed}, PAGE)


@pytest.mark.parametrize("case", AT_ZERO, ids=lambda case: case.id)
def test_pages_are_chosen_by_keys_at_0_and_queries_at_the_distance(case: PolicyCase) -> None:
    expected = Still(case, OPTIONS, PAGE).run(BATCH)
    assert turned(case).run(BATCH) == expected
    assert turned(case, positions="orig").run(BATCH) != expected


def prefilled(made: World, start: int, limit: int) -> dict[tuple[int, int], Attended | None]:
    """What a prompt's tokens attend to, from ``start`` on."""
    chosen: dict[tuple[int, int], Attended | None] = {}
    for first in range(start, PROMPT, limit):
        chunk = Piece(1, first, min(limit, PROMPT - first), True)
        chosen |= made.run([chunk], cached=False)
    return chosen


@pytest.mark.parametrize("case", [AT_ZERO[0], *LOCALLY], ids=lambda case: case.id)
def test_same_request_same_pages(case: PolicyCase) -> None:
    """Alone as in a batch; in any chunks; behind a prefix hit."""
    together = turned(case).run(BATCH)
    for piece in BATCH[:4]:
        alone = turned(case).run([piece])
        assert alone == {key: together[key] for key in alone}, piece
    most = turned(case).chunk_limit or PROMPT
    cold = prefilled(turned(case), 0, most)
    assert prefilled(turned(case), 0, WINDOW) == cold
    made = turned(case)
    made.prefill(1, 320)
    with made.keys_differ_from(1, 320):
        made.run([Piece(1, 320, 5 * WINDOW, True)], cached=False)
    start = 320 - made.pipeline.stages.hit_margin(LOCAL, WINDOW)
    made.pages_of[1] = made.pages_of[1][: start // PAGE]
    hit = prefilled(made, start, most)
    assert hit == {key: cold[key] for key in hit}


@pytest.mark.parametrize("budget", [46, 4000], ids=["some", "everything"])
@pytest.mark.parametrize("policy", ["streaming", "channels"])
def test_which_windows_are_moved(policy: str, budget: int) -> None:
    """All beyond ``dense_below``, whether they select pages or not: budgets move nothing."""
    made = turned(PolicyCase(policy, {}, retrieves=policy != "streaming"), budget=budget)
    plan = made.plan(BATCH)
    assert plan is not None
    assert plan.table is not None
    made.attend(BATCH, plan)
    ends = plan.step.windows.context_end
    assert plan.moved.tolist() == np.flatnonzero(ends > DENSE_BELOW).tolist()
    assert 0 < len(plan.moved) < len(ends)
    tokens = {s: int(plan.step.windows.num_tokens[s]) for s in plan.moved}
    assert sum(tokens.values()) == 64 + 37 + 1 + 5 + 192 - 96
    assert made.plan([Piece(9, 0, 96, True)]) is None


def test_a_dense_request_attends_to_everything_at_fixed_positions() -> None:
    made = turned(PolicyCase("channels", {}))
    made.asked = {2: EVERYTHING}
    plan = made.plan(BATCH)
    assert plan is not None
    made.attend(BATCH, plan)
    windows = plan.step.windows
    [mine] = [s for s in range(len(windows)) if BATCH[windows.request[s]].request == 2]
    assert mine in plan.moved
    every = tuple(range(-(-BATCH[1].stop // PAGE)))
    for head, entries in enumerate(made.rows(plan, mine)):
        assert made.logical(2, head, entries) == every


def test_a_context_within_the_distance_is_not_moved() -> None:
    made = turned(PolicyCase("streaming", {}, retrieves=False), dense_below=0)
    assert made.plan([Piece(1, 0, LOCAL + 1, True)]) is None
    plan = made.plan([Piece(2, 0, LOCAL + 2, True)])
    assert plan is not None
    assert len(plan.moved) == 1
