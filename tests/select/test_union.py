"""Union of hits and key selection: shares are kept, no page twice, the newest of equals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.errors import KvplugError
from kvplug.index.page_mass import PageMass
from kvplug.select.union import Union, union_reference
from tests.made_up import HEAD_DIM, layer_of
from tests.steps import Far, counts_of, step_of

NAN, INF = math.nan, math.inf


def chosen(
    scores: list[float], mass: list[float], wanted: int, split: float, begin: int = 0
) -> list[int]:
    """The selection from one row of scores, whose pages lie in reverse order."""
    pages = len(scores) + begin
    layer = layer_of(torch.zeros(pages, 1, 8, HEAD_DIM), num_pages=pages, num_kv_heads=1)
    select = Union(split).for_layer(layer)
    weights = torch.tensor([[NAN]] * begin + [[value] for value in mass])
    layer.own(PageMass).mass.copy_(weights.flip(0))
    table = torch.arange(pages - 1, -1, -1, dtype=torch.int32)[None]
    step = step_of([Far(0, begin, pages, wanted)], table)
    selected = torch.full((1, 1, wanted), -9, dtype=torch.int32)
    row = torch.tensor([[scores]], dtype=torch.float32)
    select.select(row, step, counts_of(step, 1), selected)
    return selected[0, 0].tolist()


@pytest.mark.parametrize(
    ("scores", "mass", "wanted", "split", "expected"),
    [
        pytest.param([3, 1, 2, 0], [0, 0, 0, 9], 2, 1.0, [0, 2], id="1: the index only"),
        pytest.param([3, 1, 2, 0], [0, 5, 0, 9], 2, 0.0, [1, 3], id="0: key selection only"),
        pytest.param([3, 1, 2, 0], [0, 5, 0, 9], 2, 0.5, [0, 3], id="one each"),
        pytest.param([3, 1, 2, 0], [9, 5, 0, 4], 2, 0.5, [0, 1], id="both want one: the next mass"),
        pytest.param([3, 1, 2, 0], [9, 5, 0, 4], 4, 0.5, [0, 1, 2, 3], id="all of them"),
        pytest.param([0, 0, 1, 0], [4, 9, 0, 2], 3, 1.0, [0, 1, 2], id="too few hits: mass"),
        pytest.param([0, 0, 0, 0], [4, 9, 0, 2], 2, 1.0, [0, 1], id="no hits: mass"),
        pytest.param([-3, -1, -2, -1], [4, 9, 0, 2], 2, 1.0, [0, 1], id="below zero: no hits"),
        pytest.param([2, 2, 2, 2], [9, 0, 0, 0], 2, 1.0, [2, 3], id="overflow: the newest hits"),
        pytest.param([0, 0, 0, 0], [0, 0, 0, 0], 2, 0.5, [2, 3], id="nothing: the newest"),
        pytest.param([NAN] * 4, [NAN] * 4, 2, 0.5, [2, 3], id="no numbers: the newest"),
        pytest.param([INF, NAN, 1, -INF], [0, 0, 0, 0], 1, 1.0, [2], id="infinity is no hit"),
        pytest.param([INF, NAN, 0, -INF], [0, 7, 3, 0], 1, 1.0, [1], id="NaN is no hit"),
        pytest.param([0, 0, 5, 0], [NAN, 1, 0, 0], 2, 0.5, [1, 2], id="NaN after any mass"),
        pytest.param([3, 2, 1, 0], [0, 0, 0, 9], 3, 0.5, [0, 1, 3], id="halves go to the index"),
        pytest.param([3, 2, 1, 0], [0, 0, 0, 9], 3, 0.4, [0, 2, 3], id="nearest page"),
        pytest.param([3, 0, 0, 0], [0, 9, 0, 0], 1, 0.5, [0], id="one page is the index's"),
    ],
)  # fmt: skip
def test_choice(
    scores: list[float], mass: list[float], wanted: int, split: float, expected: list[int]
) -> None:
    assert chosen(scores, mass, wanted, split) == expected
    rows = torch.tensor([scores], dtype=torch.float32), torch.tensor([mass], dtype=torch.float32)
    assert union_reference(*rows, wanted, split, 0).tolist() == [expected]


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_twin(data: st.DataObject) -> None:
    """Few values, so that ties abound; and never a page twice."""
    count = data.draw(st.integers(1, 30))
    value = st.sampled_from([0.0, 1.0, 2.0, 16.0, -1.0, NAN, INF, -INF, 0.5, 1e-45])
    weight = st.sampled_from([0.0, 1.0, 0.25, 3e37, 1e-45, NAN])
    scores = data.draw(st.lists(value, min_size=count, max_size=count))
    mass = data.draw(st.lists(weight, min_size=count, max_size=count))
    wanted, begin = data.draw(st.integers(1, count)), data.draw(st.integers(0, 3))
    split = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]))
    found = chosen(scores, mass, wanted, split, begin)
    assert found == sorted(set(found))
    assert set(found) <= set(range(begin, begin + count))
    rows = torch.tensor([scores]), torch.tensor([mass])
    assert found == union_reference(*rows, wanted, split, begin)[0].tolist()


def test_windows_apart() -> None:
    """Each window and head has its own request, scores, far range and count."""
    layer = layer_of(torch.zeros(120, 1, 8, HEAD_DIM))
    select = Union(0.5).for_layer(layer)
    mass = layer.own(PageMass).mass.copy_(torch.randint(0, 4, (40, 3)))
    table = torch.stack([torch.randperm(40), torch.randperm(40)]).to(torch.int32)
    far = [
        Far(0, 2, 9, 3), Far(1, 0, 0, 0, sparse=False), Far(1, 0, 12, 5), Far(1, 4, 5, 1),
    ]  # fmt: skip
    step = step_of(far, table)
    scores = torch.randint(0, 6, (3, 3, 12)).float()
    kept = scores.clone()
    selected = torch.full((3, 3, 6), -9, dtype=torch.int32)
    select.select(scores, step, counts_of(step, 3), selected)
    for w, window in enumerate((far[0], far[2], far[3])):
        pages = table[window.request, window.begin : window.end].long()
        mine = kept[w, :, : len(pages)]
        expected = union_reference(mine, mass[pages].T, window.selected, 0.5, window.begin)
        assert torch.equal(selected[w, :, : window.selected], expected)
        assert (selected[w, :, window.selected :] == -9).all()


@pytest.mark.parametrize("split", [-0.1, 1.01, NAN])
def test_what_is_no_share_is_refused(split: float) -> None:
    with pytest.raises(KvplugError, match=rf"needs 0 <= split <= 1, not {split}\.$"):
        Union(split)
