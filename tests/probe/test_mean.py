"""The mean probe is the mean query of each query head, and the query itself at decode."""

from __future__ import annotations

import pytest
import torch

from kvplug.probe.mean import MeanProbe, mean_queries_reference
from kvplug.workspace import Workspace
from tests.steps import Far, step_of

WINDOWS = [
    Far(0, 0, 9, tokens=1), Far(0, 0, 0, tokens=4, sparse=False), Far(1, 0, 9, tokens=7),
    Far(2, 0, 9, tokens=2), Far(2, 0, 9, tokens=1),
]  # fmt: skip
TOKENS = 15


@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("heads", [1, 3])
def test_twin(heads: int, group: int) -> None:
    """Integers add up exactly, so both divide the same sums."""
    queries = torch.randint(-99, 99, (TOKENS, heads * group, 6)).float()
    step = step_of(WINDOWS)
    vectors, counts = MeanProbe().build(queries, heads, step, Workspace())
    assert vectors.shape == (4, heads, group, 6)
    assert counts.tolist() == [group] * 4
    assert torch.equal(vectors, mean_queries_reference(queries, heads, step))


def test_decode_probes_with_the_query_itself() -> None:
    queries = torch.randn(3, 6, 8)
    step = step_of([Far(row, 0, 9) for row in range(3)])
    vectors, _ = MeanProbe().build(queries, 2, step, Workspace())
    assert torch.equal(vectors.flatten(1, 2), queries)


def test_a_constant_window_gives_that_query() -> None:
    query = torch.randint(-9, 9, (1, 6, 8)).float()
    vectors, _ = MeanProbe().build(
        query.repeat(13, 1, 1), 2, step_of([Far(0, 0, 9, tokens=13)]), Workspace()
    )
    assert torch.equal(vectors.flatten(1, 2), query)
