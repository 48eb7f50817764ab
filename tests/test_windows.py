"""Windows cover a step's tokens once, in order, cut where the request says and not the scheduler.

Compared with a reference that goes token by token, over any legal geometry and batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings

from kvplug.pages import PageGeometry
from kvplug.windows import cut_windows
from tests.made_up import Piece
from tests.steps import cut, steps


class Cell(NamedTuple):
    """A run of tokens of one request that share a selection, or attend to everything."""

    request: int
    first: int
    stop: int
    sparse: bool


def cells(geometry: PageGeometry, batch: list[Piece]) -> list[Cell]:
    """Windows by their definition; adjacent dense ones joined, but not across ``dense_below``."""
    joined: list[Cell] = []
    for piece in batch:
        size = geometry.window if piece.prefilling else 1
        edges = [p for p in range(piece.start, piece.stop) if p % size == 0 or p == piece.start]
        for first, stop in zip(edges, [*edges[1:], piece.stop], strict=True):
            local_page = max(first + 1 - geometry.local, 0) // geometry.page
            retrievable = local_page - geometry.sink_pages
            sparse = retrievable > geometry.budget_pages and stop > geometry.dense_below
            last = joined[-1] if joined else None
            crosses = bool(last and last.stop <= geometry.dense_below < stop)
            joins = last and last.request == piece.request and not sparse and not last.sparse
            if last and joins and not crosses:
                joined[-1] = last._replace(stop=stop)
            else:
                joined.append(Cell(piece.request, first, stop, sparse))
    return joined


@given(steps())
@settings(max_examples=300, deadline=None)
def test_windows_are_those_of_the_definition(step: tuple[PageGeometry, list[Piece]]) -> None:
    geometry, batch = step
    windows = cut(geometry, batch)
    starts = np.cumsum([0, *(piece.tokens for piece in batch)])
    found = [
        Cell(
            int(windows.request[s]),
            int(windows.context_end[s] - windows.num_tokens[s]),
            int(windows.context_end[s]),
            bool(windows.sparse[s]),
        )
        for s in range(len(windows))
    ]
    assert found == cells(geometry, batch)
    for s, cell in enumerate(found):
        offset = cell.first - batch[cell.request].start
        assert windows.token_start[s] == starts[cell.request] + offset


@given(steps())
@settings(max_examples=200, deadline=None)
def test_every_token_is_in_one_window(step: tuple[PageGeometry, list[Piece]]) -> None:
    geometry, batch = step
    windows = cut(geometry, batch)
    covered = [
        token
        for start, count in zip(windows.token_start, windows.num_tokens, strict=True)
        for token in range(start, start + count)
    ]
    assert covered == list(range(sum(piece.tokens for piece in batch)))
    assert (windows.num_tokens > 0).all()


@given(steps())
@settings(max_examples=200, deadline=None)
def test_sparse_windows_keep_to_absolute_boundaries(
    step: tuple[PageGeometry, list[Piece]],
) -> None:
    geometry, batch = step
    windows = cut(geometry, batch)
    for s in np.flatnonzero(windows.sparse):
        first = windows.context_end[s] - windows.num_tokens[s]
        last = windows.context_end[s] - 1
        assert first // geometry.window == last // geometry.window
        if not batch[windows.request[s]].prefilling:
            assert windows.num_tokens[s] == 1


@given(steps())
@settings(max_examples=200, deadline=None)
def test_regions_are_disjoint_and_complete(step: tuple[PageGeometry, list[Piece]]) -> None:
    """Sinks, far and local pages follow one another; local tokens are at least those wanted."""
    geometry, batch = step
    windows = cut(geometry, batch)
    for s in range(len(windows)):
        begin, end = int(windows.far_begin[s]), int(windows.far_end[s])
        if not windows.sparse[s]:
            assert (begin, end, windows.num_selected[s]) == (0, 0, 0)
            continue
        first = int(windows.context_end[s] - windows.num_tokens[s])
        assert begin == geometry.sink_pages
        assert windows.num_selected[s] == geometry.budget_pages < end - begin
        local_tokens = first + 1 - end * geometry.page
        assert geometry.local <= local_tokens < geometry.local + geometry.page
        assert windows.context_end[s] > geometry.dense_below


WHOLE = PageGeometry(
    page=4, window=8, sink_pages=1, local=4, budget_pages=2, dense_below=0, most_pages=2
)


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 63, 64, 65, 200])
@pytest.mark.parametrize("chunk", [8, 24, 64])
def test_a_prompt_has_the_same_windows_in_any_chunks(prompt: int, chunk: int) -> None:
    def sparse(batch: list[Piece]) -> list[tuple[int, ...]]:
        windows = cut(WHOLE, batch)
        fields = (windows.context_end, windows.num_tokens, windows.far_begin, windows.far_end)
        return [tuple(int(f[s]) for f in fields) for s in np.flatnonzero(windows.sparse)]

    parts = []
    for start in range(0, prompt, chunk):
        parts += sparse([Piece(0, start, min(chunk, prompt - start), True)])
    assert parts == sparse([Piece(0, 0, prompt, True)])


def test_dense_windows_of_two_requests_are_not_joined() -> None:
    windows = cut(WHOLE, [Piece(0, 0, 8, True), Piece(1, 0, 8, True)])
    assert windows.request.tolist() == [0, 1]


def test_an_empty_step_has_no_windows() -> None:
    none = np.zeros(0, np.int32)
    assert len(cut_windows(np.zeros(1, np.int32), none, none.astype(bool), WHOLE)) == 0


def test_a_request_without_tokens_has_no_window() -> None:
    """vLLM pads its batches with such rows."""
    starts, ends = np.array([0, 1, 1], np.int32), np.array([100, 0], np.int32)
    windows = cut_windows(starts, ends, np.array([False, False]), WHOLE)
    assert windows.request.tolist() == [0]
