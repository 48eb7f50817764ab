"""Pages that hold a share of the mass: no fewer, and no more."""

from __future__ import annotations

import math

import pytest
import torch

from kvplug.budget.top_p import TopPBudget
from kvplug.kernels.top_p import BLOCK, top_p, top_p_reference
from kvplug.workspace import Workspace
from tests.made_up import layer_of
from tests.steps import Far, step_of
from tests.steps import counts_of as budget_of

NAN, INF = math.nan, math.inf


def counts_of(
    scores: torch.Tensor, far: list[int], budget: int, share: float, temperature: float = 1.0
) -> list[torch.Tensor]:
    """``[S, Hk]`` by the kernel and by its twin, which add up alike."""

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=scores.device)

    begin = column([3 + s for s in range(len(far))])
    end = column([3 + s + n for s, n in enumerate(far)])
    results = []
    for function in (top_p, top_p_reference):
        counts = torch.empty(scores.shape[:2], dtype=torch.int32, device=scores.device)
        total = torch.tensor([7], device=scores.device)
        masses = torch.empty_like(scores)
        function(scores, begin, end, budget, share, temperature, masses, counts, total)
        assert total.item() == 7 + counts.sum().item()
        results.append(counts.cpu())
    return results


@pytest.mark.parametrize("share", [0.01, 0.5, 0.85, 0.999])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
def test_twins(share: float, temperature: float, device: str) -> None:
    """And the stage on CPU; what is behind a row's pages is not read."""
    far, budget = [1, 2, 37, BLOCK, BLOCK + 1, 2 * BLOCK + 9], 700
    scores = torch.full((len(far), 2, max(far)), 1e30)
    for s, count in enumerate(far):
        scores[s, :, :count] = torch.randn(2, count) * 3 - 50
    found, twin = counts_of(scores.to(device), far, budget, share, temperature)
    assert torch.equal(found, twin)
    step = step_of([Far(0, 3, 3 + count, budget) for count in far])
    theirs = budget_of(step, 2)
    stage = TopPBudget(share, temperature).for_layer(layer_of())
    stage.count(scores.clone(), torch.empty(0), step, theirs, Workspace())
    assert torch.equal(found, theirs)
    assert (found >= 1).all()
    assert (found <= budget).all()


@pytest.mark.parametrize(
    ("masses", "share", "expected"),
    [
        ([0.6, 0.3, 0.1], 0.5, 1),
        ([0.3, 0.1, 0.6], 0.61, 2),
        ([0.1, 0.6, 0.3], 0.89, 2),
        ([0.1, 0.6, 0.3], 0.91, 3),
        ([0.25] * 4, 0.26, 2),
        ([0.25] * 4, 0.74, 3),
        ([0.5, 0.125, 0.125, 0.125, 0.125], 0.7, 3),
        ([0.9, 0.1], 1e-9, 1),
        ([1.0], 0.99, 1),
    ],
)
def test_by_hand(masses: list[float], share: float, expected: int, device: str) -> None:
    scores = torch.tensor([[masses]], device=device).log()
    assert counts_of(scores, [len(masses)], 99, share)[0].item() == expected


# The interpreter warns of infinity less infinity.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_number_weighs_nothing(device: str) -> None:
    """A row without numbers gets the budget, as the newest pages are taken then."""
    rows = [[NAN, 2.0, INF, 2.0, -INF], [NAN, INF, NAN, -INF, NAN], [0.0] * 5]
    scores = torch.tensor(rows, device=device)[:, None]
    found, twin = counts_of(scores, [5, 5, 0], 4, 0.6)
    assert found.flatten().tolist() == twin.flatten().tolist() == [2, 4, 4]


def test_what_has_no_meaning_is_refused(device: str) -> None:
    scores = torch.zeros(1, 2, 4, device=device)
    for budget, share, temperature, match in (
        (4, 1.0, 1.0, "A share must be between 0 and 1, not 1"),
        (4, 0.5, 0.0, "Temperature must be positive"),
        (0, 0.5, 1.0, "at least 1 page"),
    ):
        with pytest.raises(ValueError, match=match):
            counts_of(scores, [4], budget, share, temperature)
