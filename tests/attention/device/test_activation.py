"""Probe activation on a GPU: the weights, and so the pages, of the pipeline on CPU.

Every request's statistics lie on its pages, which the host never sees.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.attention.device.query_statistics import DeviceQueryStatistics
from kvplug.probe.query_statistics import QueryStatistics
from tests.attention.device.schedule import schedule
from tests.attention.device.stock import stand_in
from tests.attention.device.test_impl import close
from tests.attention.device.world import SMALL, World
from tests.made_up import Piece

ACTIVATION: dict[str, Any] = {"probe": "activation"}
BOTH: dict[str, Any] = {"probe": ["activation", {"name": "last_activated", "last": 2, "active": 1}]}
PROMPTS = {0: 150, 1: 33, 2: 202}


def world_of(
    monkeypatch: pytest.MonkeyPatch, policy: str = "simhash", options: dict[str, Any] | None = None
) -> World:
    stand_in(monkeypatch, SMALL)
    return World(policy, options=ACTIVATION if options is None else options)


def agrees(world: World, pieces: list[Piece]) -> bool:
    """Whether a step selects the pages that the pipeline on CPU selects, and attends to them."""
    attended = close(world.step(pieces), world.expected(pieces))
    return attended and world.selected() == world.on_cpu_selected


def statistics(world: World) -> tuple[DeviceQueryStatistics, QueryStatistics]:
    assert world.impl.stages is not None
    assert world.cpu_layer is not None
    (mine,) = (w for w in world.impl.stages.watchers if isinstance(w, DeviceQueryStatistics))
    (theirs,) = (m for m in world.cpu_layer.memories if isinstance(m, QueryStatistics))
    return mine, theirs


def assert_same_statistics(world: World) -> None:
    """On all pages: queries are about 2, and 200 of them are summed up in another order."""
    mine, theirs = statistics(world)
    assert torch.equal(mine.counts.cpu(), theirs.counts)
    assert theirs.counts.any()
    known = theirs.counts > 0
    for ours, other in zip(mine.state[:2], theirs.state[:2], strict=True):
        torch.testing.assert_close(ours.cpu()[known], other[known], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "options", "limit"),
    [
        ("simhash", ACTIVATION, 64),
        ("channels", ACTIVATION, 128),
        ("quest", {"probe": {"name": "activation", "share": "each", "sharpness": 3.0}}, 64),
        ("simhash", BOTH, 128),
        ("quest", {"probe": ["mean", {"name": "activation", "warm_up": 3}]}, 128),
    ],
    ids=str,
)
def test_requests_of_unequal_lengths(
    policy: str, options: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks beside decoded tokens, which come to a window's last page and the next."""
    world = world_of(monkeypatch, policy, options)
    for pieces in schedule(PROMPTS, limit, 3 if limit == 128 else 12):
        assert agrees(world, pieces), pieces
    assert_same_statistics(world)


@pytest.mark.parametrize("options", [ACTIVATION, BOTH], ids=["activation", "union"])
def test_a_prefix_hit(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A request goes on from pages of another, and finds what that one's prompt gave."""
    world = world_of(monkeypatch, options=options)
    world.content_of[4] = 0
    for pieces in schedule({0: 150}, 64, 2):
        assert agrees(world, pieces)
    world.pages[4] = world.pages[0][:6]  # three windows
    for piece in (Piece(4, 96, 64, True), Piece(4, 160, 40, True), Piece(4, 200, 1, False)):
        assert agrees(world, [Piece(0, 152 + piece.start % 3, 1, False), piece])
    mine, _ = statistics(world)
    assert (mine.counts[world.pages[4][192 // 16]] == 200).all()
    assert_same_statistics(world)


def test_a_prefix_of_a_request_of_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM hands out blocks that the step itself fills."""
    world = world_of(monkeypatch)
    world.content_of[4] = 0
    assert agrees(world, [Piece(0, 0, 64, True)])
    world.slots(0, 64, 128)
    world.pages[4] = world.pages[0][:8]
    assert agrees(world, [Piece(0, 64, 64, True), Piece(4, 128, 64, True)])
    mine, _ = statistics(world)
    assert (mine.counts[world.pages[4][11]] == 192).all()
    assert_same_statistics(world)


# The interpreter warns of what comes of NaN.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("share", ["all", "each"])
@pytest.mark.parametrize("token", [40, 140])
def test_a_head_with_a_nan(token: int, share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what is scored, its window sits out; in what is scored, its token weighs nothing."""
    world = world_of(monkeypatch, options={"probe": {"name": "activation", "share": share}})
    world.content(0).queries[token, 1, 5] = torch.nan
    for pieces in schedule({0: 200}, 64, 1):
        found, expected = world.step(pieces), world.expected(pieces)
        first = pieces[0].start
        known = [n for n in range(len(found)) if first + n != token]  # itself it stays NaN
        assert close(found[known], expected[known])
        assert world.selected() == world.on_cpu_selected
    mine, _ = statistics(world)
    assert mine.counts[world.pages[0][12]].tolist() == [200, 200 - 32, 200, 200]
    assert_same_statistics(world)


def test_pages_of_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they carried for it is nobody's."""
    world = world_of(monkeypatch)
    for pieces in schedule({5: 150}, 64, 1):
        world.step(pieces)
        world.expected(pieces)
    before = world.pages.pop(5)
    world._free.extend(before)
    for pieces in schedule({6: 202}, 96, 1):
        assert agrees(world, pieces)
    assert set(before) <= set(world.pages[6])
    fresh = world_of(monkeypatch)
    for pieces in schedule({6: 202}, 96, 1):
        fresh.step(pieces)
    last = 192 // 16
    mine, other = statistics(world)[0].state, statistics(fresh)[0].state
    for tensor, expected in zip(mine, other, strict=True):
        assert torch.equal(tensor[world.pages[6][last]], expected[fresh.pages[6][last]])


def test_replayed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a preemption decoded tokens come back in one step, and may begin several windows."""
    world = world_of(monkeypatch)
    for pieces in schedule({0: 150}, 64, 0):
        assert agrees(world, pieces)
    assert agrees(world, [Piece(0, 150, 45, False), Piece(2, 0, 64, True)])
    assert agrees(world, [Piece(0, 195, 1, False), Piece(2, 64, 64, True)])
    assert_same_statistics(world)


def test_the_same_request_gets_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: in whatever chunks, and beside whatever else."""
    alone, beside = world_of(monkeypatch), world_of(monkeypatch)
    answers = [alone.step(pieces) for pieces in schedule({2: 202}, 32, 2)]
    found = []
    for pieces in schedule(PROMPTS, 128, 2):
        output = beside.step(pieces)
        start = 0
        for piece in pieces:
            if piece.request == 2:
                found.append(output[start : start + piece.tokens])
            start += piece.tokens
    assert torch.equal(torch.cat(found), torch.cat(answers))


def test_most_decode_steps_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        "kvplug.attention.device.query_statistics.query_statistics",
        lambda windows, *_: calls.append(len(windows.num_tokens)),
    )
    world = world_of(monkeypatch)
    for pieces in schedule({0: 150}, 160, 12):
        world.step(pieces)
    assert calls == [5, 1]  # the prompt's windows; the token that begins the next, 160
