"""Shares: the twin agrees, a probe counts once whatever its length, NaN harms no other page."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.index.shares import share_scores_reference, sum_shares

NAN, INF = float("nan"), float("inf")


def scores_of(logits: torch.Tensor, far: tuple[int, int] | None = None) -> torch.Tensor:
    """``[Hk, N]`` of one window with logits ``[Hk, R, N]`` in units of ln 2."""
    heads, probes, pages = logits.shape
    begin, end = far or (0, pages)
    scores = torch.full((1, heads, pages), -5.0)
    columns = (np.array([number], np.int32) for number in (probes, 0, begin, end))
    sum_shares(1, logits[None].numpy(), *columns, scores.numpy())
    return scores[0]


@pytest.mark.parametrize("probes", [1, 2, 9])
@pytest.mark.parametrize("pages", [1, 7, 100])
@pytest.mark.parametrize("size", [0.5, 20.0])
def test_twin(pages: int, probes: int, size: float) -> None:
    logits = size * torch.randn(3, probes, pages)
    expected = share_scores_reference(logits)
    # Logits of 100 are floats within 4e-6; shares and logarithms add a few units in the last place.
    assert (scores_of(logits) - expected).abs().max() <= 2e-5 * max(1, size)


def test_shares_of_one_probe_sum_to_1() -> None:
    assert scores_of(5 * torch.randn(3, 1, 50)).exp().sum(1).sub(1).abs().max() < 1e-5


def test_a_longer_probe_does_not_outvote_another() -> None:
    """Each points at one page; ten times the length makes the one no better than the other."""
    logits = torch.zeros(1, 2, 20)
    logits[0, 0, 4], logits[0, 1, 11] = 300.0, 30.0
    scores = scores_of(logits)[0]
    assert set(scores.topk(2).indices.tolist()) == {4, 11}
    assert abs(scores[4] - scores[11]) < 1e-4


def test_far_smaller_shares_stay_numbers() -> None:
    logits = torch.tensor([[[0.0, -1e6, -3e38]]])
    scores = scores_of(logits)
    assert scores.isfinite().all()
    assert scores.argmax() == 0


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_logit_that_is_no_number_harms_no_other_page(bad: float) -> None:
    logits = torch.randn(2, 3, 9)
    expected = scores_of(logits[:, :, torch.arange(9) != 5])
    logits[:, 1, 5] = bad
    logits[:, ::2, 5] = -1e4  # no share, so that the others' stay
    found = scores_of(logits)
    assert found[:, 5].isnan().all()
    # Equal but for the order of a sum of 9 or of 8 terms.
    assert (found[:, torch.arange(9) != 5] - expected).abs().max() < 1e-6


def test_only_far_pages_are_written() -> None:
    scores = scores_of(torch.randn(2, 2, 9), (3, 8))
    assert (scores[:, 5:] == -5).all()
    assert (scores[:, :5] < 1).all()
