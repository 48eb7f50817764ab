"""Events are retrieved whole and with their neighbours; a row is always full."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.errors import KvplugError
from kvplug.index.minmax import MinMax
from kvplug.policies.base import Stages
from kvplug.probe.mean import MeanProbe
from kvplug.segment.base import EventStarts
from kvplug.segment.uniform import Uniform
from kvplug.select.base import Select
from kvplug.select.events import Events, events_reference
from tests.made_up import layer_of
from tests.steps import Far, counts_of, step_of

NAN, INF = torch.nan, torch.inf


def selector(starts: list[int], most: int, contiguity: float, pages: int = 64) -> Select:
    """A layer's, with boundaries at these physical pages."""
    layer = layer_of(page=8, num_pages=pages)
    layer.shared(EventStarts).limit(8 * most)
    layer.shared(EventStarts).starts[starts] = 1
    return Events(contiguity=contiguity).for_layer(layer)


def chosen(
    scores: list[float], starts: list[int], wanted: int, contiguity: float = 0.0, most: int = 64
) -> list[int]:
    """Pages chosen from one row whose pages are 0, 1, ..."""
    step = step_of([Far(0, 0, len(scores), wanted)])
    row = torch.tensor(scores, dtype=torch.float32)[None, None]
    selected = torch.full((1, 1, wanted), -1, dtype=torch.int32)
    select = selector(starts, most, contiguity, max(len(scores), 1))
    select.select(row, step, counts_of(step, 1), selected)
    return selected[0, 0].tolist()


def test_an_event_scores_as_its_best_page_and_comes_whole() -> None:
    assert chosen([0, 9, 0, 5, 5, 5, 1, 1], [3, 6], 3) == [0, 1, 2]
    assert chosen([0, 9, 0, 5, 5, 5, 1, 1], [3, 6], 6) == [0, 1, 2, 3, 4, 5]


def test_the_last_event_gives_its_best_pages() -> None:
    assert chosen([0, 9, 0, 5, 4, 6, 1, 1], [3, 6], 5) == [0, 1, 2, 3, 5]
    assert chosen([1, 1, 1, 1, 2, 2, 2, 2], [4], 2) == [6, 7]  # of equal pages the newest


def test_long_events_are_cut() -> None:
    """Every ``most`` pages after a start, whether or not another start follows."""
    scores = [0.0, 0, 0, 0, 0, 7, 0, 0, 0]
    assert chosen(scores, [], 3, most=3) == [3, 4, 5]
    assert chosen(scores, [1], 3, most=3) == [4, 5, 6]
    assert chosen(scores, [1, 5], 2, most=3) == [5, 7]
    assert chosen(scores, [1, 5], 3, most=3) == [5, 6, 7]


def test_neighbours_follow_then_precede_nearest_pages_first() -> None:
    scores, starts = [0.0, 0, 0, 0, 9, 9, 0, 0, 0, 8], [2, 4, 6, 8]
    assert chosen(scores, starts, 4, 0.5) == [4, 5, 6, 7]  # the event, then the one after
    assert chosen(scores, starts, 5, 0.6) == [3, 4, 5, 6, 7]  # and the nearest page before
    assert chosen(scores, starts, 4, 0.0) == [4, 5, 8, 9]  # off: the next event by score


def test_neighbours_come_in_the_order_of_their_events() -> None:
    scores, starts = [0.0, 8, 0, 0, 0, 9, 0, 0], list(range(8))
    assert chosen(scores, starts, 3, 0.4) == [1, 5, 6]
    assert chosen(scores, starts, 4, 0.5) == [1, 4, 5, 6]
    assert chosen(scores, starts, 5, 0.6) == [1, 2, 4, 5, 6]
    assert chosen(scores, starts, 6, 0.67) == [0, 1, 2, 4, 5, 6]


@pytest.mark.parametrize(("length", "kept"), [(3, True), (4, True), (5, True), (6, False)])
def test_the_last_event_is_kept_if_overshoot_is_below_undershoot(length: int, kept: bool) -> None:
    """The best event leaves 3 pages of a share of 7 to the second; 7 are for neighbours."""
    scores = [0.0] * 10 + [9.0] * 4 + [0.0] * 10 + [8.0] * length
    got = chosen(scores, [10, 14, 24], 14, 0.5)
    second = list(range(24, 24 + length)) if kept else []
    assert got == [*range(10, 24 - len(second)), *second]


def test_without_neighbours_the_row_is_filled_by_score() -> None:
    assert chosen([9.0, 1, 2, 3], [1, 2, 3], 3, 0.4) == [0, 1, 3]  # 1 follows 0
    assert chosen([1.0, 2, 3, 9], [], 2, 0.5, most=4) == [2, 3]  # one event, longer than its share


@pytest.mark.parametrize("contiguity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_scores_that_say_nothing_give_the_newest_pages(contiguity: float, bad: float) -> None:
    for wanted in range(1, 13):
        got = chosen([bad] * 12, [1, 2, 5, 9], wanted, contiguity, most=3)
        assert got == list(range(12 - wanted, 12))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_is_the_reference(data: st.DataObject) -> None:
    """Rows of several windows and heads, at shuffled pages, with NaN and ties."""
    pages, heads = 40, 2
    value = st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0, NAN, INF, -INF])
    far = []
    for row in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, 5))
        end = data.draw(st.integers(begin + 1, 30))
        far.append(Far(row, begin, end, data.draw(st.integers(1, end - begin))))
    width = max(window.end - window.begin for window in far)
    scores = torch.tensor(
        [[[data.draw(value) for _ in range(width)] for _ in range(heads)] for _ in far]
    )
    table = torch.stack([torch.randperm(pages)[:32] for _ in far]).int()
    most, share = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9]))
    starts = [p for p in range(pages) if data.draw(st.booleans())]
    step = step_of(far, table)
    counts = counts_of(step, heads)
    selected = torch.full((len(far), heads, int(counts.max())), -1, dtype=torch.int32)
    selector(starts, most, share, pages).select(scores.clone(), step, counts, selected)
    for w, window in enumerate(far):
        begins: list[int] = []
        for n in range(window.end - window.begin):
            marked = int(table[w, window.begin + n]) in starts
            if not begins or marked or n - begins[-1] == most:
                begins.append(n)
        for head in range(heads):
            row = scores[w, head, : window.end - window.begin]
            expected = events_reference(row, begins, window.selected, share)
            got = selected[w, head, : window.selected].tolist()
            assert got == [window.begin + n for n in expected]
            assert len(set(got)) == window.selected


def test_counts_differ_by_head() -> None:
    step = step_of([Far(0, 0, 6, 4)])
    scores = torch.tensor([[[0.0, 0, 9, 0, 0, 0], [5.0, 0, 0, 0, 0, 0]]])
    selected = torch.full((1, 2, 4), -1, dtype=torch.int32)
    counts = torch.tensor([[1, 4]], dtype=torch.int32)
    selector([2, 4], 9, 0.0).select(scores, step, counts, selected)
    assert selected.tolist() == [[[2, -1, -1, -1], [0, 1, 4, 5]]]


def test_needs_a_segment() -> None:
    with pytest.raises(KvplugError, match="needs a segment stage"):
        Stages(index=MinMax(), probe=MeanProbe(), select=Events())
    Stages(index=MinMax(), probe=MeanProbe(), select=Events(), segment=Uniform())


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_without_events_are_refused(share: float) -> None:
    with pytest.raises(KvplugError, match="contiguity < 1"):
        Events(contiguity=share)


def test_scratch_is_shared_and_stops_growing() -> None:
    layer = layer_of(page=8, num_pages=64)
    a, b = Events().for_layer(layer), Events().for_layer(layer)
    step = step_of([Far(0, 0, 12, 4)])
    scores = torch.from_numpy(np.arange(12, dtype=np.float32))[None, None]
    sizes = []
    for select in (a, b, a):
        selected = torch.zeros((1, 1, 4), dtype=torch.int32)
        select.select(scores, step, counts_of(step, 1), selected)
        sizes.append(a.scratch.nbytes())  # type: ignore[attr-defined]
    assert sizes[0] == sizes[1] == sizes[2]
