"""Rows of the rewritten page table: the right pages of the right head, lengths, query order.

Compared with a reference in plain Python, over any legal geometry and batch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.errors import KvplugError
from kvplug.page_table import PageTable
from kvplug.pages import PageGeometry, single_head_view
from kvplug.step import Step
from kvplug.windows import Windows
from kvplug.workspace import Workspace
from tests.made_up import Piece
from tests.steps import counts_of, cut, steps

Made = tuple[PageGeometry, list[Piece], int, Step, PageTable, torch.Tensor]


@st.composite
def tables(draw: st.DrawFn) -> Made:
    """A step's page table with random pages selected, in memory full of garbage.

    Where budgets vary, layers before this one have left their rows, some longer and some shorter.
    """
    geometry, batch = draw(steps())
    varies = geometry.budget_pages > 0 and draw(st.booleans())
    if varies:
        more = draw(st.integers(0, geometry.budget_pages))
        geometry = geometry._replace(most_pages=geometry.budget_pages + more)
    heads = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    widths = [-(-piece.stop // geometry.page) for piece in batch]
    physical = random.permutation(sum(widths)).astype(np.int32) + 1
    block_table = np.zeros((len(batch), max(widths) + 1), np.int32)
    for row, width in enumerate(widths):
        block_table[row, :width], physical = physical[:width], physical[width:]
    step = Step(cut(geometry, batch), torch.from_numpy(block_table), geometry.most_pages)
    windows, rows = step.windows, step.sparse_windows
    workspace = Workspace()
    workspace.take("table.pages", (4096, 60), torch.int32).fill_(-77)
    table = PageTable(step, geometry, heads, workspace)
    selected = torch.full((len(rows), heads, step.max_selected), -1, dtype=torch.int32)
    for _ in range(1 + 2 * varies):
        selected.fill_(-1)
        counts = counts_of(step, heads)
        for w, s in enumerate(rows):
            far = np.arange(windows.far_begin[s], windows.far_end[s])
            for head in range(heads):
                if varies:
                    counts[w, head] = random.integers(1, min(len(far), geometry.most_pages) + 1)
                chosen = random.choice(far, int(counts[w, head]), replace=False)
                selected[w, head, : len(chosen)] = torch.from_numpy(np.sort(chosen))
        table.write_selected(selected, counts, varies)
    return geometry, batch, heads, step, table, selected


def expected_pages(windows: Windows, s: int, page: int, chosen: list[int]) -> list[int]:
    """Logical pages of a window's row, from its definition."""
    every = list(range(-(-int(windows.context_end[s]) // page)))
    if not windows.sparse[s]:
        return every
    return every[: windows.far_begin[s]] + chosen + every[windows.far_end[s] :]


@given(tables())
@settings(max_examples=160, deadline=None)
def test_rows(made: Made) -> None:
    geometry, _, heads, step, table, selected = made
    windows = step.windows
    sparse = step.sparse_windows.tolist()
    assert table.table.shape == (len(windows) * heads, geometry.max_pages_per_row())
    for s in range(len(windows)):
        pages = step.block_table_host[windows.request[s]]
        for head in range(heads):
            chosen = selected[sparse.index(s), head].tolist() if s in sparse else []
            chosen = [page for page in chosen if page >= 0]
            logical = expected_pages(windows, s, geometry.page, chosen)
            row = s * heads + head
            found = table.table[row, : len(logical)].tolist()
            assert found == [int(pages[n]) * heads + head for n in logical]
            # Only the last page may be partly filled, as in the request itself.
            missing = -int(windows.context_end[s]) % geometry.page
            assert int(table.seq_lens[row]) == len(logical) * geometry.page - missing
            assert table.seq_lens[row] >= windows.num_tokens[s]


@given(tables())
@settings(max_examples=80, deadline=None)
def test_no_row_is_wider_than_the_table(made: Made) -> None:
    """A wider one would be written past its end, into the next row or outside."""
    geometry, table = made[0], made[4]
    most = int((table.seq_lens + geometry.page - 1).max()) // geometry.page
    assert most <= geometry.max_pages_per_row()


@given(tables())
@settings(max_examples=80, deadline=None)
def test_query_start(made: Made) -> None:
    step, table = made[3:5]
    assert table.query_start[0] == 0
    assert table.query_start.diff().tolist() == step.windows.num_tokens.tolist()
    assert table.rows().is_decoding == (step.windows.num_tokens == 1).all()


@given(tables(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_shares_are_the_softmax_of_scores(made: Made, seed: int) -> None:
    """For selected pages; what is attended to unasked counts as 1, a score of NaN as nothing."""
    _, _, heads, step, table, selected = made
    sparse, windows = step.sparse_windows.tolist(), step.windows
    draw = np.random.default_rng(seed)
    shape = (len(sparse), heads, step.max_far_pages)
    scores = torch.from_numpy(draw.normal(0, 3, shape).astype(np.float32))
    scores[torch.from_numpy(draw.random(shape) < 0.1)] = torch.nan
    table.shares.fill(7)
    table.shares[
        [s * heads + h for s in range(len(windows)) if s not in sparse for h in range(heads)]
    ] = 1
    table.write_shares(scores, selected, (selected >= 0).sum(-1).int())
    for s in range(len(windows)):
        for head in range(heads):
            expected = np.ones(table.table.shape[1])
            if s in sparse:
                w, begin = sparse.index(s), int(windows.far_begin[s])
                mine = scores[w, head, : int(windows.far_end[s]) - begin].double()
                softmax = mine.nan_to_num(nan=-torch.inf).softmax(0).nan_to_num()
                for i, page in enumerate(p for p in selected[w, head].tolist() if p >= 0):
                    expected[begin + i] = softmax[page - begin]
            np.testing.assert_allclose(table.shares[s * heads + head], expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 4, 6), (5, 3, 4, 6), (7, 2, 32, 128)], ids=str)
def test_single_head_view(shape: tuple[int, ...]) -> None:
    pages, heads, page, width = shape
    cache = torch.arange(pages * heads * page * width).view(shape)
    single = single_head_view(cache)
    assert single.shape == (pages * heads, 1, page, width)
    assert single.data_ptr() == cache.data_ptr()
    for b in range(pages):
        for h in range(heads):
            assert torch.equal(single[b * heads + h, 0], cache[b, h])


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(torch.zeros(4, 8, 2, 6).transpose(1, 2), id="token-major"),
        pytest.param(torch.zeros(4, 8, 12), id="three-dimensional"),
        pytest.param(torch.zeros(4, 2, 8, 12)[..., :6], id="part of a wider cache"),
    ],
)
def test_other_layouts_are_refused(cache: torch.Tensor) -> None:
    with pytest.raises(KvplugError, match="contiguous head-major"):
        single_head_view(cache)
