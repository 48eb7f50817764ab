"""Steps of decoded tokens behind a hot pool as CUDA graphs: replays keep the pool too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.attention.device.pooled import PooledWorld
from tests.attention.device.stock import stand_in
from tests.attention.device.test_decode_plan import ROWS, Captured, decoded
from tests.attention.device.world import SMALL, World
from tests.made_up import Piece

LEAST = 8 * SMALL.kv_heads
OPTIONS: dict[str, Any] = {"options": {"graphs": True}}
FILLED = [Piece(0, 150, 1, True), Piece(1, 40, 1, True), Piece(2, 30, 1, True)]


@pytest.mark.parametrize(
    ("slots", "turns"), [(LEAST, 4), (2 * LEAST + 1, 2), (ROWS * LEAST, 1)], ids=str
)
@pytest.mark.parametrize("policy", ["quest", "streaming"])
def test_a_replayed_graph_attends_as_one_without_a_pool(
    policy: str, slots: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: dense contexts beside sparse ones, others, fewer, and a prompt between."""
    stand_in(monkeypatch, SMALL)
    pooled, plain = PooledWorld(policy, slots, **OPTIONS), World(policy, **OPTIONS)
    graphs = [Captured(world) for world in (pooled, plain)]
    for world in (pooled, plain):
        world.fill(FILLED)

    def check(pieces: list[Piece]) -> None:
        before = pooled.told.turns[0]
        assert torch.equal(*(graph.step(pieces) for graph in graphs))
        assert pooled.pools[0].check_integrity()
        assert pooled.selected_as(plain)
        assert pooled.told.turns[0] - before == turns

    check(decoded(150, 40, 30))
    check(decoded(151, 41, 31))
    check(decoded(152)[:1])
    prompt = [Piece(2, 32, 100, True)]  # whose windows no graph takes
    assert torch.equal(*(world.step(prompt) for world in (pooled, plain)))
    check([Piece(2, 132, 1, False), Piece(0, 153, 1, False)])
    check(decoded(154, 42, 133))
    counts = pooled.told.counts
    assert counts.misses > 0
    assert counts.hits > 0
    assert (counts.evictions > 0) == (slots < ROWS * LEAST)


def test_a_layer_launches_six_kernels_more() -> None:
    """And sends what was counted."""
    plain, pooled = (
        Captured(world).graph.names
        for world in (World("quest", **OPTIONS), PooledWorld("quest", ROWS * LEAST, **OPTIONS))
    )
    more = [name for name in pooled if name != "fill_"]
    for name in plain:
        if name != "fill_":
            more.remove(name)
    assert sorted(more) == [
        "_copy_pages_kernel", "_find_slots_kernel", "_list_missing_kernel", "_slot_rows_kernel",
        "_take_slots_kernel", "_write_slots_kernel", "copy_",
    ]  # fmt: skip
