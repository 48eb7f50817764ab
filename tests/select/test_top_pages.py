"""Top pages: the best, ascending; of equals the newest; NaN and infinities after every number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.select.top_pages import TopPages, top_pages_reference
from tests.steps import Far, counts_of, step_of

NAN, INF = math.nan, math.inf


def chosen(scores: list[float], wanted: int, begin: int = 0) -> list[int]:
    """The selection from one row of scores."""
    step = step_of([Far(0, begin, begin + len(scores), wanted)])
    selected = torch.full((1, 1, wanted), -9, dtype=torch.int32)
    row = torch.tensor([[scores]], dtype=torch.float32)
    TopPages().select(row, step, counts_of(step, 1), selected)
    return selected[0, 0].tolist()


@pytest.mark.parametrize(
    ("scores", "wanted", "expected"),
    [
        pytest.param([3.0], 1, [0], id="one page"),
        pytest.param([1.0, 3.0, 2.0], 2, [1, 2], id="the best, ascending"),
        pytest.param([1.0, 3.0, 2.0], 3, [0, 1, 2], id="all of them"),
        pytest.param([5.0] * 6, 2, [4, 5], id="all equal: the newest"),
        pytest.param([2.0, 7.0, 2.0, 2.0, 1.0], 3, [1, 2, 3], id="ties at the edge: the newest"),
        pytest.param([NAN, 1.0, NAN], 1, [1], id="NaN after a number"),
        pytest.param([NAN, -INF, NAN], 1, [2], id="NaN and infinity alike: the newest"),
        pytest.param([NAN, -3e38, NAN], 2, [1, 2], id="after the least number, the newest NaN"),
        pytest.param([NAN, NAN, NAN], 2, [1, 2], id="NaN only: the newest"),
        pytest.param([-NAN, 1.0, math.copysign(NAN, -1)], 1, [1], id="negative NaN"),
        pytest.param([INF, 1.0, INF, -INF], 2, [1, 3], id="infinities after a number"),
        pytest.param([-INF] * 4, 3, [1, 2, 3], id="minus infinity only"),
        pytest.param([-2.0, -1.0, -3.0], 1, [1], id="negative"),
        pytest.param([1e-45, 0.0, -1e-45], 1, [0], id="denormal above zero"),
        pytest.param([-1e-45, -1e-44, -2.0], 1, [0], id="denormals below zero"),
        pytest.param([1.0, 1.0000001, 1.0], 1, [1], id="one bit apart"),
        pytest.param([0.0, -0.0], 1, [1], id="zero equals minus zero"),
        pytest.param([-0.0, 0.0, -0.0], 2, [1, 2], id="zeros of both signs: the newest"),
    ],
)
def test_choice(scores: list[float], wanted: int, expected: list[int]) -> None:
    assert chosen(scores, wanted) == expected
    row = torch.tensor([scores], dtype=torch.float32)
    assert top_pages_reference(row, wanted, 0).tolist() == [expected]


# Few distinct values, so that ties abound. Minus zero has a test of its own above.
SCORES = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, INF, -INF, NAN, 64.0, 63.0, 1e-45]),
    st.floats(width=32).filter(lambda x: x != 0),
)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_twin(data: st.DataObject) -> None:
    scores = data.draw(st.lists(SCORES, min_size=1, max_size=40))
    wanted = data.draw(st.integers(1, len(scores)))
    begin = data.draw(st.integers(0, 9))
    expected = top_pages_reference(torch.tensor([scores]), wanted, begin)
    assert chosen(scores, wanted, begin) == expected[0].tolist()


@pytest.mark.parametrize("wanted", [1, 64, 2047, 2048, 2049, 4999, 5000])
def test_many_pages(wanted: int) -> None:
    """More than the histogram has bins; few values and many."""
    for scores in (torch.randint(40, 64, (5000,)).float(), torch.randn(5000)):
        expected = top_pages_reference(scores[None], wanted, 0)[0].tolist()
        assert chosen(scores.tolist(), wanted) == expected


def test_windows_apart() -> None:
    """Each window and head has its own scores, far range and count; the rest is left alone."""
    far = [
        Far(0, 2, 9, 3), Far(1, 0, 0, 0, sparse=False), Far(1, 0, 12, 5), Far(1, 4, 5, 1),
    ]  # fmt: skip
    scores = torch.randint(0, 6, (3, 2, 12)).float()
    for w, count in enumerate((7, 12, 1)):
        scores[w, :, count:] = INF  # no page is there
    selected = torch.full((3, 2, 6), -9, dtype=torch.int32)
    step = step_of(far)
    TopPages().select(scores.clone(), step, counts_of(step, 2), selected)
    for w, window in enumerate((far[0], far[2], far[3])):
        mine = scores[w, :, : window.end - window.begin]
        expected = top_pages_reference(mine, window.selected, window.begin)
        assert torch.equal(selected[w, :, : window.selected], expected)
        assert (selected[w, :, window.selected :] == -9).all()


def test_nothing_wanted_writes_nothing() -> None:
    step = step_of([Far(0, 0, 3, 0), Far(0, 0, 3, 2)])
    selected = torch.full((2, 1, 2), -9, dtype=torch.int32)
    scores = torch.tensor([[[1.0, 2.0, 3.0]]] * 2)
    TopPages().select(scores, step, counts_of(step, 1), selected)
    assert selected[:, 0].tolist() == [[-9, -9], [1, 2]]
