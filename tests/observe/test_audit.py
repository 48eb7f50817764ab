"""Audits: a sample of windows, the same in every layer, measured exactly and exported."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from kvplug.observe.audit import BEST, CAPTURED, SECONDS, LayerAudit, Sampler
from kvplug.observe.mass_meter import MassMeter
from tests.cases import PolicyCase
from tests.made_up import Piece, World, reader_of
from tests.steps import Far, step_of

OPTIONS = {"budget": 40, "sink": 8, "local": 16, "window": 16, "dense_below": 0}


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 1.0])
def test_a_fraction_is_chosen_evenly(fraction: float) -> None:
    sampler, chosen, seen = Sampler(fraction), 0, 0
    for size in [1, 1, 7, 1, 16, 2] * 5:
        step = step_of([Far(0, 1, 20)] * size)
        first = sampler.choose(step)
        assert sampler.choose(step) == first, "every layer of a step audits the same windows"
        chosen, seen = chosen + len(first), seen + size
        assert abs(chosen - fraction * seen) <= 1


def test_dense_windows_are_not_audited() -> None:
    step = step_of([Far(0, 0, 0, 0, False), Far(1, 1, 20), Far(2, 0, 0, 0, False)])
    assert Sampler(1.0).choose(step) == [1]


def sample(name: str) -> float:
    return REGISTRY.get_sample_value(name, {"layer": "5"}) or 0.0


def test_what_is_measured_is_exported() -> None:
    world = World(PolicyCase("quest", {}), OPTIONS)
    batch = [Piece(0, 128, 37, True), Piece(1, 250, 1, False)]
    plan = world.plan(batch)
    assert plan is not None
    world.attend(batch, plan)
    meter = MassMeter(reader_of(world.cache), 0.25, 0.0, since=0)
    names = [f"{name}_{kind}" for name in (CAPTURED, BEST) for kind in ("sum", "count")]
    before = [sample(name) for name in names]
    took = REGISTRY.get_sample_value(f"{SECONDS}_total") or 0.0
    LayerAudit(meter, Sampler(1.0), 5)(world.queries(batch), plan)
    meter(world.queries(batch), plan)
    captured, count, best, count_too = (
        sample(name) - old for name, old in zip(names, before, strict=True)
    )
    assert count == count_too == len(meter.measured) == 4
    assert captured == pytest.approx(sum(mass.captured for mass in meter.measured))
    assert best == pytest.approx(sum(mass.best for mass in meter.measured))
    assert captured <= best
    assert (REGISTRY.get_sample_value(f"{SECONDS}_total") or 0.0) > took
