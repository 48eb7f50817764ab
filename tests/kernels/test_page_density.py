"""Densities of page scores: as accurate as plain torch, and those of the twin on CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.budget.density import _densities, density_reference
from kvplug.kernels.page_density import BLOCK, page_density, page_density_reference
from tests.kernels.accuracy import EPS, assert_accurate

HEADS = 3
NAN, INF = torch.nan, torch.inf


def densities(
    scores: torch.Tensor, far: list[int], wanted: list[int], temperature: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[S, Hk]`` by the kernel, in float32 and in float64; rows that are left alone are -9."""

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=scores.device)

    begin, end = (
        column([3 + s for s in range(len(far))]),
        column([3 + s + n for s, n in enumerate(far)]),
    )
    results = []
    for launch, dtype in (
        (page_density, torch.float32),
        (page_density_reference, torch.float32),
        (page_density_reference, torch.float64),
    ):
        found = torch.full(scores.shape[:2], -9, dtype=dtype, device=scores.device)
        launch(scores, begin, end, column(wanted), temperature, found)
        results.append(found)
    return results[0], results[1], results[2]


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("pages", [[2, 3, 100, 7], [BLOCK, BLOCK + 1, BLOCK - 1, 2 * BLOCK + 5]])
def test_accuracy(pages: list[int], temperature: float, device: str) -> None:
    """What is behind a row's pages is not read; hash scores are whole numbers."""
    scores = torch.full((4, HEADS, max(pages)), 1e30)
    for s, count in enumerate(pages):
        scores[s, :, :count] = torch.randn(HEADS, count) * 7 + 100
    scores[0, :, : pages[0]] = torch.randint(0, 64, (HEADS, pages[0]))
    found, plain, exact = densities(scores.to(device), pages, [1, 1, 0, 1], temperature)
    # A score of 100 is known to 2^-18, a standard deviation of 7 / temperature beside it.
    assert_accurate(found, plain, exact, 2**-12 / temperature)
    assert (found[2] == -9).all()
    on_cpu = torch.full((4, HEADS), -9.0)
    begin = np.full(4, 3, np.int32)
    rows = np.array([0, 1, 3], np.int32)
    theirs = torch.zeros(3, HEADS)
    _densities(
        1, scores[[0, 1, 3]].numpy(), np.arange(3, dtype=np.int32), begin[:3],
        begin[:3] + np.array(pages, np.int32)[rows], np.float32(temperature), theirs.numpy(),
    )  # fmt: skip
    on_cpu[[0, 1, 3]] = theirs
    assert (found.cpu() - on_cpu).abs().max() < 2**-12 / temperature
    for s in rows:
        expected = density_reference(scores[s, :, : pages[s]], temperature)
        assert (found[s].cpu().double() - expected).abs().max() < 2**-12 / temperature


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-30, 1e30, 0.1])
@pytest.mark.parametrize("pages", [2, 7, 2000])
def test_pages_that_are_alike(value: float, pages: int, device: str) -> None:
    scores = torch.full((1, 1, pages), value, device=device)
    assert densities(scores, [pages], [1])[0].item() == 1


# The interpreter warns of infinity less infinity.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_number_is_left_out(device: str) -> None:
    """And a row that has no two numbers has no density."""
    rows = [[5.0, 9.0, NAN, INF, -INF], [NAN, 2.0, INF, NAN, NAN], [NAN] * 5, [5.0, 9.0, 0, 0, 0]]
    scores = torch.tensor(rows, device=device)[:, None]
    found, plain, _ = densities(scores, [5, 5, 5, 2], [1] * 4)
    assert found[0] == found[3]
    assert found[1:3].isnan().all()
    assert plain[1:3].isnan().all()
    p = torch.tensor([1 / (1 + np.exp(-4)), 1 / (1 + np.exp(4))])
    assert abs(found[0].item() + (p * p.log()).sum().item() / np.log(2)) < 16 * EPS


def test_a_window_without_far_pages(device: str) -> None:
    scores = torch.zeros(1, 2, 4, device=device)
    assert densities(scores, [0], [1])[0].isnan().all()


def test_what_cannot_be_read_is_refused(device: str) -> None:
    scores = torch.zeros(1, 2, 4, device=device)
    with pytest.raises(ValueError, match="Temperature must be positive, not 0"):
        densities(scores, [4], [1], 0.0)
    with pytest.raises(ValueError, match=r"begin must be int32 \[1\]"):
        densities(scores, [4, 4], [1])
