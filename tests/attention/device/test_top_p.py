"""Budget top_p on a GPU: every row's pages are those that the pipeline on CPU gives it."""

from __future__ import annotations

import pytest

from tests.attention.device.schedule import schedule
from tests.attention.device.stock import stand_in
from tests.attention.device.test_impl import close
from tests.attention.device.world import SMALL, World


@pytest.mark.parametrize(
    ("policy", "p"), [("quest", 0.9), ("channels", 0.6), ("quest", 1.0)], ids=str
)
def test_rows_get_pages_of_their_own(
    policy: str, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In prompts and at decode; what was counted is what the pipeline on CPU counts."""
    stand_in(monkeypatch, SMALL)
    budget = {"name": "top_p", "p": p, "temperature": 0.5}
    world = World(policy, options={"budget": budget}, budget=80)
    sizes: set[int] = set()
    for pieces in schedule({0: 230, 1: 60, 2: 199}, 128, 2):
        assert close(world.step(pieces), world.expected(pieces))
        assert world.selected() == world.on_cpu_selected
        assert world.builder.pipeline.counts == world.on_cpu.counts
        sizes |= {len(pages) for heads in world.selected()[0].values() for pages in heads}
    # Local pages alone differ by one.
    assert (max(sizes) - min(sizes) > 1) == (p < 1)
