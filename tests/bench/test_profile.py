"""Clocks add up every call of what they wrap, and leave nothing behind."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from vllm.platforms import current_platform

from kvplug.bench.profile import Clocks, targets
from kvplug.errors import KvplugError
from tests.cases import PolicyCase
from tests.made_up import World


class Worker:
    def work(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def fail(self) -> None:
        raise ValueError("no")


class Heir(Worker):
    pass


def test_calls_add_up() -> None:
    clocks = Clocks()
    with clocks.on(Worker, "work", "a"):
        assert Worker().work(0.01) == 0.01
        assert Heir().work(0.02) == 0.02
    Worker().work(0.05)
    assert 0.03 <= clocks.seconds["a"] < 0.05


def test_nothing_is_left_behind() -> None:
    original, clocks = Worker.work, Clocks()
    with pytest.raises(ValueError, match="no"), clocks.on(Worker, "fail", "b"):
        Worker().fail()
    with clocks.on(Heir, "work", "c"):
        assert "work" in vars(Heir)
        Worker().work(0.0)
    assert Worker.work is original
    assert "work" not in vars(Heir)
    assert set(clocks.seconds) == {"b"}


def test_a_gpu_has_clocks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(KvplugError, match="kvplug bench kernels"):
        targets([])


def test_every_stage_is_timed_once() -> None:
    world = World(PolicyCase("actqkv", {}), {"dense_below": 100})
    layer = SimpleNamespace(impl=SimpleNamespace(stages=world.layer))
    parts = targets([layer, layer])["parts"]
    labels = [label for _, _, label in parts]
    assert len(labels) == len(set(labels))
    assert {"probe", "score", "budget", "choose", "table", "watch QueryStatistics"} <= set(labels)
