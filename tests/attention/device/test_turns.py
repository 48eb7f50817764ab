"""Turns hold whole windows in order, as many as surely fit, and say what they list at most."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.attention.device.decode_plan import DecodePlans
from kvplug.attention.device.plan import Lengths, make_plan
from kvplug.attention.device.turns import Pool, decode_turns, fitting, turns_of
from kvplug.pages import PageGeometry

WIDTH = 8


def runs(request: list[int], pages: list[int], most: int) -> list[tuple[int, int, int]]:
    return list(fitting(np.array(request, np.int32), np.array(pages, np.int32), WIDTH, most))


@pytest.mark.parametrize(
    ("request_", "pages", "most", "expected"),
    [
        ([0, 1, 2], [30, 3, 30], 19, [(0, 3, 19)]),
        ([0, 1, 2], [30, 3, 30], 18, [(0, 2, 11), (2, 3, 8)]),
        ([0, 1, 2], [30, 30, 30], 8, [(0, 1, 8), (1, 2, 8), (2, 3, 8)]),
        # Windows of one context list no more than the longest has.
        ([4, 4, 4, 4], [9, 10, 11, 12], 12, [(0, 4, 12)]),
        ([4, 4, 4, 4], [9, 10, 11, 12], 11, [(0, 3, 11), (3, 4, 8)]),
        ([4, 4, 5, 4], [9, 10, 4, 12], 13, [(0, 2, 10), (2, 4, 12)]),
        ([4, 4, 5, 4], [9, 10, 4, 12], 14, [(0, 3, 14), (3, 4, 8)]),
    ],
    ids=str,
)
def test_runs(
    request_: list[int], pages: list[int], most: int, expected: list[tuple[int, int, int]]
) -> None:
    assert runs(request_, pages, most) == expected


def test_any_rows_fit_the_run_that_they_are_in() -> None:
    """Of random windows, whatever each of them lists."""
    random = np.random.default_rng(3)
    for _ in range(200):
        count = int(random.integers(1, 12))
        request = random.integers(0, 3, count).tolist()
        pages = random.integers(1, 20, count).tolist()
        most = WIDTH + int(random.integers(0, 30))
        before = 0
        for first, last, listed in runs(request, pages, most):
            assert first == before < last
            before = last
            chosen = {
                (request[s], int(page))
                for s in range(first, last)
                for page in random.permutation(pages[s])[:WIDTH]
            }
            assert len(chosen) <= listed <= most
        assert before == count


def test_windows_and_tokens_of_turns() -> None:
    """Decoded tokens first; the tokens of other windows begin at 0 in every turn."""
    geometry = PageGeometry(16, 32, 1, 32, 2, 64, 2)
    starts = np.array([0, 100, 101, 171], np.int32)
    lengths = Lengths(starts, np.array([260, 190, 200]), np.array([True, False, True]))
    table = torch.arange(60, dtype=torch.int32).view(3, 20)
    plan = make_plan(lengths, table, torch.arange(171), geometry, 32)
    sparse = plan.sparse
    assert sparse is not None
    assert sparse.singles == 1
    turns = turns_of(plan, 16, Pool(WIDTH, 3, 3 * 2 * WIDTH))
    assert len(turns) > 2
    assert [turn.windows.singles for turn in turns] == [1] + [0] * (len(turns) - 1)
    assert all(turn.most <= 3 * 2 * WIDTH for turn in turns)
    rows = [row for turn in turns for row in range(*turn.rows.indices(10**6))]
    assert rows == list(range(3 * len(sparse)))
    tokens = torch.cat([turn.windows.tokens for turn in turns])
    assert torch.equal(tokens, sparse.tokens)
    for turn in turns:
        part = turn.windows
        several = part.num_tokens[part.singles :]
        ends = torch.cat([torch.zeros(1, dtype=torch.int32), several.cumsum(0).int()])
        assert torch.equal(part.query_start, ends)
        assert len(part.tokens) == int(ends[-1])
        assert len(part) * 3 == turn.rows.stop - turn.rows.start
    (whole,) = turns_of(plan, 16, Pool(WIDTH, 3, 10**4))
    assert torch.equal(whole.windows.request, sparse.request)


def test_turns_of_a_graph_are_those_of_its_batch() -> None:
    """Whatever the contexts of its requests are."""
    plans = DecodePlans(6, 300, torch.device("cpu"))
    geometry = PageGeometry(16, 32, 1, 32, 2, 64, 2)
    pool = Pool(WIDTH, 2, 2 * WIDTH * 2 + 1)
    found = []
    for ends in ([40, 300, 200, 70, 1], [300] * 5):
        lengths = Lengths(np.arange(6, dtype=np.int32), np.array(ends), np.zeros(5, bool))
        table = torch.zeros(5, 20, dtype=torch.int32)
        plan, _ = plans.plan(lengths, table, torch.arange(5), geometry, 32)
        assert plan.sparse is not None
        found.append(decode_turns(plan.sparse, 19, pool))
        assert [turn.windows.context_end.tolist() for turn in found[-1]] == [
            ends[:2],
            ends[2:4],
            ends[4:],
        ]
        assert [turn.windows.singles for turn in found[-1]] == [2, 2, 1]
    for first, second in zip(*found, strict=True):
        assert first.rows == second.rows
        assert first.most == second.most <= pool.slots
        mine, theirs = (
            [column.data_ptr() for column in turn.windows[5:11] if column is not None]
            for turn in (first, second)
        )
        assert len(mine) == 6
        assert mine == theirs  # memory that stays
