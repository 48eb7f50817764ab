"""Contexts of windows made by hand, for tests of what writes their rows of the page table."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvplug.kernels.far_pages import FarPages
from kvplug.kernels.page_rows import Contexts, PageRows

NUM_PAGES = 12_000
NOBODY = 2**30
"""Where a row of the block table ends; to read it would be to read out of bounds."""
UNTOUCHED = -7


class Context(NamedTuple):
    """A window's context: a row of the block table, its tokens, its far pages."""

    request: int
    tokens: int
    begin: int = 0
    end: int = 0


def contexts_of(windows: list[Context], page: int, device: str) -> Contexts:
    """Windows of up to 3 requests whose pages are shuffled."""
    widths = [-(-window.tokens // page) for window in windows]
    table = torch.full((3, max(widths) + 2), NOBODY, dtype=torch.int32)
    for row in range(3):
        width = max(
            (w for w, one in zip(widths, windows, strict=True) if one.request == row), default=0
        )
        table[row, :width] = torch.randperm(NUM_PAGES)[:width]

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    far = FarPages(
        table.to(device)[:, :-1],  # strided
        column([window.request for window in windows]),
        column([window.begin for window in windows]),
        column([window.end for window in windows]),
    )
    return Contexts(far, column([window.tokens for window in windows]), page)


def untouched_rows(num: int, width: int, device: str) -> PageRows:
    """Rows full of what no kernel writes."""
    table, lengths = (
        torch.full(shape, UNTOUCHED, dtype=torch.int32, device=device)
        for shape in ((num, width), (num,))
    )
    return PageRows(table, lengths)


def assert_same_rows(found: PageRows, expected: PageRows) -> None:
    """To the bit, also what is behind the rows."""
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.table, expected.table)
