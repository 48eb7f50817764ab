"""Refinement: the prefix-sum scan is the definition, and finds the edge of a block matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.segment.refine import (
    CONDUCTANCE,
    METRICS,
    MODULARITY,
    best_split,
    best_split_reference,
    conductance,
    modularity,
)

NAMED = {"modularity": MODULARITY, "conductance": CONDUCTANCE}


def sums_of(keys: torch.Tensor) -> np.ndarray:
    """``[n + 1, Hk * D]`` float64 prefix sums of ``[n, Hk, D]``."""
    flat = keys.double().flatten(1)
    return torch.cat([torch.zeros(1, flat.shape[1]).double(), flat.cumsum(0)]).numpy()


def test_numbers_are_places_of_names() -> None:
    assert {name: METRICS.index(name) for name in NAMED} == NAMED


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 10_000), st.integers(2, 12), st.booleans())
def test_closed_forms_are_the_definitions(seed: int, size: int, positive: bool) -> None:
    """On any symmetric matrix, negative entries and all."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(size, size, generator=generator).double()
    graph = half + half.T
    if positive:
        graph = graph.abs()
    degrees, total = graph.sum(1), float(graph.sum())
    if abs(total) < 1e-3:
        return
    for t in range(1, size):
        left = torch.arange(size) < t
        parts = [(left, left), (~left, ~left)]
        expected = sum(
            (graph - torch.outer(degrees, degrees) / total)[a][:, b].sum() for a, b in parts
        ) / (2 * total)
        within, degree = float(graph[left][:, left].sum()), float(degrees[left].sum())
        assert modularity(within, degree, total) == pytest.approx(float(expected), abs=1e-9)
        cut = float(graph[left][:, ~left].sum())
        inside = (within, float(graph[~left][:, ~left].sum()))
        lighter = [min(x, total - x) for x in inside]
        best = min((cut / x for x in lighter if x > 0), default=np.inf)
        assert conductance(within, degree, total) == pytest.approx(best, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("metric", NAMED)
@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 10_000), st.data())
def test_scan_is_the_brute_force(metric: str, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(24, 2, 3, generator=generator) + data.draw(st.sampled_from([0.0, 0.7]))
    begin = data.draw(st.integers(0, 10))
    last = data.draw(st.integers(begin + 2, 22))
    first = data.draw(st.integers(begin + 1, last))
    end = data.draw(st.integers(last + 1, 24))
    found = best_split(sums_of(keys), begin, end, first, last, NAMED[metric])
    assert found == best_split_reference(keys, begin, end, first, last, metric)


@pytest.mark.parametrize("metric", NAMED)
@pytest.mark.parametrize("edge", [5, 9, 14])
def test_block_matrix_is_split_at_its_edge(metric: str, edge: int) -> None:
    keys = torch.zeros(20, 1, 2)
    keys[:edge, 0, 0] = 1
    keys[edge:, 0, 1] = 1
    assert best_split(sums_of(keys), 0, 20, 1, 18, NAMED[metric]) == edge


@pytest.mark.parametrize("metric", NAMED)
@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_keys_that_say_nothing_leave_the_boundary(metric: str, value: float) -> None:
    keys = torch.full((20, 1, 2), value)
    found = best_split(sums_of(keys), 0, 20, 4, 16, NAMED[metric])
    assert 4 <= found <= 16
    if value != 1.0:
        assert found == 16
