"""The budget of a pipeline that already serves: what the next step attends to, and what stays."""

from __future__ import annotations

import pytest

from kvplug.errors import KvplugError
from kvplug.pipeline import region_sizes
from tests.cases import PolicyCase
from tests.made_up import Piece, World

OPTIONS = {"budget": 32, "sink": 8, "local": 16, "window": 16, "dense_below": 0}
BUDGETS = (8, 32, 64)


def attended_pages(world: World) -> list[int]:
    """Pages that each KV head of a decoded token at 400 tokens attends to."""
    [attended] = world.run([Piece(0, 400, 1, False)]).values()
    assert attended is not None
    return [len(pages) for pages in attended.pages]


@pytest.mark.parametrize("name", ["quest", "simhash"])
def test_the_next_step_has_the_new_budget(name: str) -> None:
    """Selections are those of a pipeline that had the budget from the start."""
    switched = World(PolicyCase(name, {}), OPTIONS)
    for budget in (64, 8, 32):
        switched.pipeline.set_budget(budget)
        fresh = World(PolicyCase(name, {}), {**OPTIONS, "budget": budget})
        # Sink 1 page, local 15 tokens before the query and itself: pages 48, 49, 50.
        assert attended_pages(switched) == [1 + budget // 8 + 3] * 3
        for piece in (Piece(0, 400, 1, False), Piece(1, 256, 48, True)):
            assert switched.run([piece]) == fresh.run([piece])


def test_everything_that_is_read_changes() -> None:
    world = World(PolicyCase("quest", {}), OPTIONS)
    for budget in BUDGETS:
        world.pipeline.set_budget(budget)
        assert world.pipeline.config.budget == budget
        assert world.pipeline.geometry == region_sizes(world.pipeline.config, 8)
        assert world.pipeline.geometry.budget_pages == budget // 8


def test_a_budget_for_everything_is_dense() -> None:
    world = World(PolicyCase("quest", {}), OPTIONS)
    assert world.plan([Piece(0, 400, 1, False)]) is not None
    world.pipeline.set_budget(400)
    assert world.plan([Piece(0, 400, 1, False)]) is None


@pytest.mark.parametrize("budget", [7, 0, -8])
def test_a_budget_that_does_not_fit_changes_nothing(budget: int) -> None:
    world = World(PolicyCase("quest", {}), OPTIONS)
    before = world.pipeline.geometry, world.pipeline.config
    with pytest.raises(KvplugError, match=f"budget={budget}"):
        world.pipeline.set_budget(budget)
    assert (world.pipeline.geometry, world.pipeline.config) == before
