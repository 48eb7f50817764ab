"""Rows of the page table hold the right pages in order, and their lengths; nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.kernels.page_rows import Contexts, PageRows, page_rows, page_rows_reference
from kvplug.page_table import PageTable
from kvplug.pages import PageGeometry
from kvplug.step import Step
from kvplug.windows import Windows
from kvplug.workspace import Workspace
from tests.kernels.contexts import (
    UNTOUCHED,
    Context,
    assert_same_rows,
    contexts_of,
    untouched_rows,
)

HEADS = 3


def windows_of(page: int) -> list[Context]:
    """Sparse, with nothing to retrieve, dense, of one token, unused, long."""
    return [
        Context(0, 40 * page - 3, 2, 30),
        Context(1, 5 * page, 2, 2),
        Context(0, 39 * page + 1),
        Context(2, 1),
        Context(1, 0),
        Context(2, 180 * page + 1, 1, 20),
    ]


def selection(contexts: Contexts, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[S, Hk, K]`` random far pages, and ``[S, Hk]`` how many each row has, garbage behind."""
    device = contexts.context_end.device
    begin, end = contexts.far.begin.tolist(), contexts.far.end.tolist()
    selected = torch.full((len(begin), HEADS, most), 2**30, dtype=torch.int32)
    counts = torch.zeros(len(begin), HEADS, dtype=torch.int32)
    for s, (first, last) in enumerate(zip(begin, end, strict=True)):
        for head in range(HEADS):
            count = min(most - head, last - first)
            chosen = first + torch.randperm(last - first)[:count].sort().values
            selected[s, head, :count], counts[s, head] = chosen.int(), count
    return selected.to(device), counts.to(device)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_twin(page: int, device: str) -> None:
    contexts = contexts_of(windows_of(page), page, device)
    selected, counts = selection(contexts, 6)
    found, expected = (untouched_rows(6 * HEADS, 190, device) for _ in range(2))
    page_rows(selected, counts, contexts, found)
    page_rows_reference(selected, counts, contexts, expected)
    assert_same_rows(found, expected)
    assert found.lengths.tolist()[9:15] == [1, 1, 1, 0, 0, 0]
    assert found.lengths[0] == (2 + 6 + 10) * page - 3
    assert found.lengths[6] == 39 * page + 1


def test_a_row_that_does_not_fit_attends_to_nothing(device: str) -> None:
    """The last page of the first row has no place; that of the second just so."""
    contexts = contexts_of([Context(0, 40 * 16, 2, 30), Context(0, 39 * 16, 2, 30)], 16, device)
    selected, counts = selection(contexts, 6)
    counts.fill_(3)
    rows = untouched_rows(2 * HEADS, 14, device)
    page_rows(selected, counts, contexts, rows)
    assert rows.lengths.tolist() == [0] * HEADS + [14 * 16] * HEADS
    assert (rows.table[:HEADS] == UNTOUCHED).all()
    assert (rows.table[HEADS:] != UNTOUCHED).all()


def test_rows_are_those_of_the_page_table_on_cpu(device: str) -> None:
    page, contexts = 16, contexts_of(windows_of(16)[:4], 16, device)
    selected, counts = selection(contexts, 6)
    far = contexts.far
    begin, end = far.begin.cpu().numpy(), far.end.cpu().numpy()
    fixed = np.zeros(4, np.int32)
    sparse = end > begin
    windows = Windows(
        far.request.cpu().numpy(), fixed, fixed, contexts.context_end.cpu().numpy(), begin, end,
        fixed, sparse,
    )  # fmt: skip
    geometry = PageGeometry(page, page, 2, page, 6, 0, 40)
    step = Step(windows, far.block_table.cpu().contiguous(), 6)
    table = PageTable(step, geometry, HEADS, Workspace())
    kept = torch.from_numpy(step.sparse_windows)
    table.write_selected(selected.cpu()[kept], counts.cpu()[kept], True)
    rows = untouched_rows(4 * HEADS, 48, device)
    page_rows(selected, counts, contexts, rows)
    assert torch.equal(rows.lengths.cpu(), table.seq_lens)
    for row, length in enumerate(rows.lengths.tolist()):
        pages = rows.table[row, : -(-length // page)].cpu()
        assert torch.equal(pages * HEADS + row % HEADS, table.table[row, : len(pages)])


def test_what_cannot_be_read_is_refused(device: str) -> None:
    contexts = contexts_of([Context(0, 160, 2, 5)], 16, device)
    selected, counts = selection(contexts, 2)
    rows = untouched_rows(HEADS, 20, device)
    with pytest.raises(ValueError, match=r"selected must be int32 \[1, 3, K\]"):
        page_rows(selected.long(), counts, contexts, rows)
    with pytest.raises(ValueError, match=r"table must be int32 \[3, W\]"):
        page_rows(selected, counts, contexts, PageRows(rows.table[:2], rows.lengths))
    with pytest.raises(ValueError, match="Page size must be one of"):
        page_rows(selected, counts, contexts._replace(page=24), rows)
    with pytest.raises(ValueError, match=r"context_end must be int32 \[0\]"):
        page_rows(selected[:0], counts[:0], contexts, PageRows(rows.table[:0], rows.lengths[:0]))
