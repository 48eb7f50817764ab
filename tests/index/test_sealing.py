"""Sealing: each page once, by the first window that may retrieve it, whoever shares it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.index.sealing import Seals, seal_pages_reference
from kvplug.pages import PageGeometry
from kvplug.step import Step
from kvplug.windows import cut_windows
from kvplug.workspace import Workspace
from tests.made_up import Piece
from tests.steps import Far, step_of, steps


def sealed_by(seals: Seals, step: Step) -> list[list[tuple[int, int]]]:
    """Per window, the (physical, logical) pages that it seals."""
    found = seals.seal(step, Workspace())
    pairs = list(zip(found.pages.tolist(), found.logical.tolist(), strict=True))
    bounds = found.starts.tolist()
    return [pairs[a:b] for a, b in pairwise(bounds)]


def stream_of(geometry: PageGeometry, batch: list[Piece], table: torch.Tensor) -> Step:
    windows = cut_windows(
        np.cumsum([0, *(piece.tokens for piece in batch)], dtype=np.int32),
        np.array([piece.stop for piece in batch], np.int32),
        np.array([piece.prefilling for piece in batch]),
        geometry,
        merge=False,
    )
    return Step(windows, table, 1, windows, np.ones(len(batch), np.bool_))


@given(steps(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_twin(made: tuple[PageGeometry, list[Piece]], seed: int) -> None:
    """Requests share pages at random, and some of them are sealed before."""
    geometry, batch = made
    generator = torch.Generator().manual_seed(seed)
    # Requests share many pages, but none has a page twice.
    rows = [torch.randperm(600, generator=generator)[:400] for _ in batch]
    table = torch.stack(rows).to(torch.int32)
    seals = Seals(600)
    seals.flags[torch.randint(0, 600, (200,), generator=generator)] = 1
    flags = seals.flags.clone()
    step = stream_of(geometry, batch, table)
    assert sealed_by(seals, step) == seal_pages_reference(step, flags)
    assert torch.equal(seals.flags, flags)


@pytest.mark.parametrize("chunk", [16, 48, 160, 320])
def test_the_same_window_seals_a_page_whatever_the_chunks(chunk: int) -> None:
    """A page leaves the local region of 20 tokens before the window's first query.

    One far page is the budget, so nothing is sealed before there are two.
    """
    geometry = PageGeometry(8, 16, 2, 20, 1, 0, 1)
    seals, table = Seals(50), torch.arange(49, 9, -1, dtype=torch.int32)[None]
    found: dict[int, int] = {}
    for start in range(0, 320, chunk):
        step = stream_of(geometry, [Piece(0, start, min(chunk, 320 - start), True)], table)
        for s, pages in enumerate(sealed_by(seals, step)):
            for physical, logical in pages:
                assert physical == 49 - logical
                found[logical] = start + 16 * s
    expected = {
        n: next(w for w in range(0, 320, 16) if (max(n, 3) + 1) * 8 <= w + 1 - 20)
        for n in range(2, (304 + 1 - 20) // 8)
    }
    assert found == expected


def test_a_window_that_attends_to_everything_seals_nothing() -> None:
    """Of the sparse ones behind it, the first seals what all of them may choose."""
    table = torch.arange(10, dtype=torch.int32)[None]
    windows = [Far(0, 1, 3, sparse=False), Far(0, 1, 5), Far(0, 1, 6)]
    found = sealed_by(Seals(10), step_of(windows, table))
    assert found == [[], [(1, 1), (2, 2), (3, 3), (4, 4)], [(5, 5)]]


def test_pages_that_another_request_left_open_are_sealed() -> None:
    """A prefix hit joins the blocks of a request that ended early and of one that did not."""
    seals = Seals(10)
    sealed_by(seals, step_of([Far(0, 1, 3)]))  # seals pages 1 and 2
    seals.flags[5] = 1
    table = torch.arange(10, dtype=torch.int32)[None]
    assert sealed_by(seals, step_of([Far(0, 1, 7)], table)) == [[(3, 3), (4, 4), (6, 6)]]


def test_requests_of_one_step_share_a_page() -> None:
    table = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 7]], dtype=torch.int32)
    found = sealed_by(Seals(8), step_of([Far(0, 1, 3), Far(1, 1, 4)], table))
    assert found == [[(1, 1), (2, 2)], [(7, 3)]]


@pytest.mark.parametrize("slot", [12, 13, 15])
def test_any_write_opens_its_page(slot: int) -> None:
    """Also the second write to a later slot, which replaces a rejected draft."""
    seals = Seals(6)
    step = step_of([Far(0, 0, 6)])
    sealed_by(seals, step)
    seals.reset(np.array([-1, slot, -5]), 4)
    assert seals.flags.tolist() == [1, 1, 1, 0, 1, 1]
    assert sealed_by(seals, step) == [[(3, 3)]]
    assert sealed_by(seals, step) == [[]]


def begun_by(seals: Seals, step: Step) -> list[int]:
    return seals.seal(step, Workspace()).begun.tolist()


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_context_begins_when_it_is_first_retrieved_from(sinks: int) -> None:
    """Once for requests that share its first page, and again when that is written to."""
    table = torch.tensor([[4, 1, 2, 3, 5], [4, 1, 2, 3, 6], [7, 8, 9, 10, 11]], dtype=torch.int32)
    far = [Far(0, sinks, 4), Far(0, sinks, 5), Far(1, sinks, 5), Far(2, 0, 5, sparse=False)]
    seals, step = Seals(12), step_of(far, table)
    assert begun_by(seals, step) == [0]
    assert begun_by(seals, step) == []
    assert begun_by(seals, step_of([Far(1, sinks, 5), Far(2, sinks, 5)], table)) == [2]
    seals.reset(np.array([4 * 8 + 3]), 8)
    assert begun_by(seals, step_of([Far(1, sinks, 5), Far(2, sinks, 5)], table)) == [1]
