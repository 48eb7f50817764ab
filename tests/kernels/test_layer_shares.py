"""Budgets of all layers: those that the stage on CPU gives each of them, to the page."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.budget.entropy import share_out
from kvplug.kernels.layer_shares import Densities, layer_shares, layer_shares_reference
from tests.kernels.queries import carried_by

NUM_PAGES = 9


def known_of(
    layers: int, far: list[int], pages: list[int], prefills: list[int], device: str
) -> Densities:
    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    means = torch.rand(NUM_PAGES, layers, 2)
    means[..., 1] = 3
    ends = [4 + s + n for s, n in enumerate(far)]
    return Densities(
        *carried_by(pages, NUM_PAGES, device), column(prefills),
        column([4 + s for s in range(len(far))]), column(ends), means.to(device),
    )  # fmt: skip


def counts_of(known: Densities, budget: int, least: int, heads: int = 2) -> list[torch.Tensor]:
    """``[L, S, Hk]`` by the kernel and by its twin, which add up alike."""
    results = []
    for function in (layer_shares, layer_shares_reference):
        size = known.means.shape[1], len(known.request), heads
        counts = torch.empty(size, dtype=torch.int32, device=known.means.device)
        total = torch.tensor([7], device=known.means.device)
        function(known, budget, least, counts, total)
        assert total.item() == 7 + counts.sum().item()
        results.append(counts.cpu())
    return results


@pytest.mark.parametrize("layers", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("budget", [1, 2, 9, 64, 200])
def test_shares(layers: int, budget: int, device: str) -> None:
    """Decoded tokens with more or fewer far pages, windows of a prompt, and what is not known."""
    far = [budget + 1, budget + 7, 3 * budget, 400, 400, 400, 400]
    pages, prefills = [3, 0, 8, 3, -1, 5, 7], [0, 0, 0, 0, 0, 1, 0]
    known = known_of(layers, far, pages, prefills, device)
    known.means[7, layers - 1, 1] = 0
    known.means[8, :, 0] = 0
    known.means[0, layers // 2 :, 0] = 0
    found, twin = counts_of(known, budget, max(min(32, budget // 2), 1), heads=3)
    assert torch.equal(found, twin)
    assert (found[:, 4:] == budget).all()
    for s, page in enumerate(pages[:4]):
        mine = known.means[page].cpu().numpy()
        expected = [share_out(mine, rank, budget, far[s]) for rank in range(layers)]
        assert found[:, s].tolist() == [[int(count)] * 3 for count in expected]
        assert found[:, s, 0].sum() <= layers * budget
    if layers > 2 and budget > 2:
        assert len(np.unique(found[:, 3])) > 1


def test_windows_that_are_not_there(device: str) -> None:
    known = known_of(3, [], [], [], device)
    assert counts_of(known, 4, 2)[0].shape == (3, 0, 2)


def test_what_cannot_be_shared_is_refused(device: str) -> None:
    known = known_of(3, [9], [0], [0], device)
    with pytest.raises(ValueError, match="Of a budget of 4 pages no layer can get 5"):
        counts_of(known, 4, 5)
    with pytest.raises(ValueError, match=r"before must be int32 \[1\]"):
        counts_of(known._replace(before=known.before.long()), 4, 2)
