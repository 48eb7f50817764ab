"""Ranks of a union: with them, the best of a row are those that the selector on CPU takes."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.top_pages import top_pages
from kvplug.kernels.union_ranks import MOST, union_ranks, union_ranks_reference
from kvplug.select.union import union_reference
from tests.kernels.contexts import Context, contexts_of, untouched_rows
from tests.kernels.far import NUM_PAGES, Windows, windows_of
from tests.steps import Far

HEADS = 2


def some_windows(device: str) -> Windows:
    return windows_of([Far(1, 2, 41), Far(0, 7, 7), Far(0, 0, 30), Far(0, 5, 6)], [1] * 4, device)


def made(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and mass of few values, so that many are equal; some scores are no numbers."""
    scores = torch.randint(-1, 4, (4, HEADS, 45)).float()
    scores[0, 0, :9] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5, -0.0, 3, 3, 3, 1e-40])
    scores[2, 1] = 0
    return scores.to(device), torch.randint(0, 3, (NUM_PAGES, HEADS)).float().to(device)


@pytest.mark.parametrize("share", [0, 1, 5, 99, "varying"])
def test_twin(share: int | str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, in blocks of any size; what is behind a row's pages is left alone."""
    windows, (scores, mass) = some_windows(device), made(device)
    shares = (
        torch.randint(0, 12, (4, HEADS), dtype=torch.int32, device=device)
        if isinstance(share, str) else share
    )  # fmt: skip
    found, again, expected = (torch.full_like(scores, -7.0) for _ in range(3))
    union_ranks(scores, shares, mass, windows.far, found)
    union_ranks_reference(scores, shares, mass, windows.far, expected)
    assert torch.equal(found, expected)
    monkeypatch.setattr("kvplug.kernels.union_ranks.BLOCK_N", 16)
    union_ranks(scores, shares, mass, windows.far, again)
    assert torch.equal(again, expected)
    assert (found[0, :, 39:] == -7).all()
    hits = (found == MOST.value).sum(-1)
    if share == 5:
        assert hits[[0, 2, 3]].tolist() == [[5, 5], [5, 0], hits[3].tolist()]


@pytest.mark.parametrize("split", [0.0, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("wanted", [1, 3, 7, 20])
def test_the_best_of_a_row_are_those_of_the_selector_on_cpu(
    split: float, wanted: int, device: str
) -> None:
    contexts = contexts_of([Context(1, 48 * 16, 2, 41)], 16, device)
    scores, _ = made(device)
    mass = torch.randint(0, 3, (12_000, HEADS)).float().to(device)
    ranks = torch.empty(1, HEADS, 45, device=device)
    union_ranks(scores[:1], int(split * wanted + 0.5), mass, contexts.far, ranks)
    rows = untouched_rows(HEADS, 60, device)
    top_pages(ranks, wanted, contexts, rows)
    pages = contexts.far.block_table[1].long()
    mine = mass[pages[2:41]].T.cpu()
    expected = union_reference(scores[0, :, :39].cpu(), mine, wanted, split, 2)
    assert torch.equal(rows.table[:, 2 : 2 + wanted].cpu(), pages.cpu()[expected.long()].int())


def test_what_cannot_be_read_is_refused(device: str) -> None:
    windows, (scores, mass) = some_windows(device), made(device)
    ranks = torch.empty_like(scores)
    with pytest.raises(ValueError, match=r"mass must be float32 \[pages, 2\]"):
        union_ranks(scores, 1, mass[:, :1], windows.far, ranks)
    with pytest.raises(ValueError, match=r"share must be int32 \[4, 2\]"):
        union_ranks(scores, scores[:, :, 0], mass, windows.far, ranks)
