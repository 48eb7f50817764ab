"""Windows scored in turns get the scores that they get together, to the bit."""

from __future__ import annotations

import pytest
import torch

from kvplug.index import base
from kvplug.index.base import PageIndex, in_turns
from kvplug.index.channels import Channels, ChannelsIndex
from kvplug.index.simhash import SimHashIndex
from kvplug.probe.base import Probes
from kvplug.stage import Layer
from tests.caches import KeyCache, fill
from tests.made_up import layer_shape
from tests.steps import Far, step_of

FAR = [
    Far(0, 2, 40, tokens=9), Far(0, 0, 0, sparse=False), Far(0, 5, 6, tokens=1),
    Far(0, 0, 40, tokens=4), Far(0, 3, 12, tokens=1), Far(0, 1, 39, tokens=2),
]  # fmt: skip


def index_of(name: str) -> PageIndex:
    shape = layer_shape(page=4, head_dim=48, window=16, local=24, num_pages=40)
    layer = Layer(shape, {}, KeyCache(shape).reader())
    index: PageIndex
    index = SimHashIndex(layer) if name == "simhash" else ChannelsIndex(Channels(), layer)
    fill(index, torch.randn(160, 3, 48), torch.arange(40))
    return index


@pytest.mark.parametrize("name", ["simhash", "channels"])
def test_scores_do_not_depend_on_turns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(name)
    probes = Probes(torch.randn(5, 3, 4, 48), torch.tensor([4, 1, 3, 2, 4], dtype=torch.int32))
    found = []
    for scratch in (2**30, 1, 1500):
        monkeypatch.setattr(base, "SCRATCH_PER_THREAD", scratch)
        scores = torch.full((5, 3, 40), -7.0)
        index.score(probes, step_of(FAR), scores)
        found.append(scores)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert found[0].unique().numel() > 9


@pytest.mark.parametrize("windows", [0, 1, 7])
@pytest.mark.parametrize("window_bytes", [0, 1, 2**20, 2**40])
def test_every_window_has_one_turn(windows: int, window_bytes: int) -> None:
    turns = list(in_turns(windows, window_bytes))
    assert [w for turn in turns for w in range(turn.start, turn.stop)] == list(range(windows))
    assert all(turn.stop > turn.start for turn in turns)
