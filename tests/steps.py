"""Hypothesis strategies: legal geometries, and batches as vLLM's scheduler may form them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from kvplug.pages import PageGeometry
from kvplug.step import Step
from kvplug.windows import Ints, Windows, cut_windows
from tests.made_up import Piece

LONGEST = 260


@st.composite
def geometries(draw: st.DrawFn) -> PageGeometry:
    """Any that a config and a page size can make, small."""
    page = draw(st.sampled_from([1, 3, 4, 8]))
    geometry = PageGeometry(
        page=page,
        window=page * draw(st.integers(1, 5)),
        sink_pages=draw(st.integers(0, 4)),
        local=draw(st.integers(1, 4 * page + 1)),
        budget_pages=draw(st.integers(0, 6)),
        dense_below=draw(st.sampled_from([0, 1, 17, 64, 150, 1000])),
        most_pages=0,
    )
    return geometry._replace(most_pages=geometry.budget_pages)


@st.composite
def pieces(draw: st.DrawFn, window: int) -> Piece:
    """One request's part of a step: a chunk of its prompt, decoded, drafted or replayed tokens."""
    tokens = draw(st.one_of(st.just(1), st.integers(1, 90)))
    start = draw(st.integers(0, LONGEST))
    prefilling = draw(st.booleans())
    if prefilling and draw(st.integers(0, 3)):  # else the windows are cut all the same
        start = start // window * window
    return Piece(0, start, tokens, prefilling)


@st.composite
def steps(draw: st.DrawFn) -> tuple[PageGeometry, list[Piece]]:
    """A geometry and a batch; requests are named by their row."""
    geometry = draw(geometries())
    batch = draw(st.lists(pieces(geometry.window), min_size=1, max_size=5))
    return geometry, [piece._replace(request=row) for row, piece in enumerate(batch)]


def cut(geometry: PageGeometry, batch: list[Piece]) -> Windows:
    """The batch's windows."""
    return cut_windows(
        np.cumsum([0, *(piece.tokens for piece in batch)], dtype=np.int32),
        np.array([piece.stop for piece in batch], np.int32),
        np.array([piece.prefilling for piece in batch]),
        geometry,
    )


class Far(NamedTuple):
    """A window made by hand: what it may retrieve, and how much."""

    request: int
    begin: int
    end: int
    selected: int = 1
    sparse: bool = True
    tokens: int = 1


def step_of(far: Sequence[Far], block_table: torch.Tensor | None = None) -> Step:
    """A step of these windows; without a block table, every request lies at its logical pages."""

    def column(values: Sequence[int]) -> Ints:
        return np.array(values, np.int32)

    counts = [window.tokens for window in far]
    windows = Windows(
        request=column([window.request for window in far]),
        token_start=column([sum(counts[:s]) for s in range(len(far))]),
        num_tokens=column(counts),
        context_end=column([10_000] * len(far)),
        far_begin=column([window.begin for window in far]),
        far_end=column([window.end for window in far]),
        num_selected=column([window.selected for window in far]),
        sparse=np.array([window.sparse for window in far]),
    )
    if block_table is None:
        rows = int(windows.request.max()) + 1
        block_table = torch.arange(int(windows.far_end.max()), dtype=torch.int32).repeat(rows, 1)
    most = int(windows.num_selected.max())
    return Step(windows, block_table, most, windows, np.ones(len(block_table), np.bool_))


def counts_of(step: Step, heads: int) -> torch.Tensor:
    """``[W, Hk]`` pages to select, where the budget is fixed."""
    counts = torch.from_numpy(step.windows.num_selected[step.sparse_windows])
    return counts[:, None].repeat(1, heads)
