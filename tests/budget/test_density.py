"""Information density: known entropies, and that only the shape of the scores counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kvplug.budget.density import _densities, density_reference

NAN, INF = math.nan, math.inf


def densities(scores: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """``[W, Hk]`` of scores ``[W, Hk, N]``."""
    windows, heads, pages = scores.shape
    rows = np.arange(windows, dtype=np.int32)
    begin, end = np.full(windows, 3, np.int32), np.full(windows, 3 + pages, np.int32)
    found = torch.full((windows, heads), -9.0)
    _densities(1, scores.float().numpy(), rows, begin, end, np.float32(temperature), found.numpy())
    return found


def density(scores: list[float], temperature: float = 0.5) -> float:
    """Of one row."""
    return float(densities(torch.tensor([[scores]]), temperature))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("pages", [2, 3, 100, 4000])
def test_twin(pages: int, temperature: float) -> None:
    scores = torch.randn(3, 2, pages) * 7 + 100
    scores[0] = torch.randint(0, 64, (2, pages))
    found, expected = densities(scores, temperature), density_reference(scores, temperature)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-30, 1e30, 0.1])
@pytest.mark.parametrize("pages", [2, 7, 1000])
def test_pages_that_are_alike_are_as_diffuse_as_can_be(value: float, pages: int) -> None:
    assert density([value] * pages) == 1


@pytest.mark.parametrize("pages", [100, 5000])
def test_one_page_that_stands_out_is_as_sharp_as_can_be(pages: int) -> None:
    """Its standard score is the root of N - 1, and its weight all but one."""
    assert density([0.0] * (pages - 1) + [1.0]) < 1e-5


def test_two_values_by_hand() -> None:
    """Standard scores 1 and -1, so weights of e^2 to e^-2 at temperature 0.5."""
    p = 1 / (1 + math.exp(-4))
    expected = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    assert density([5.0, 9.0]) == pytest.approx(expected, abs=1e-6)


def test_only_the_shape_counts() -> None:
    scores = torch.randn(2, 2, 300)
    for changed in (scores * 1e3, scores * 1e-3, scores + 20, scores.flip(-1)):
        assert torch.allclose(densities(changed), densities(scores), atol=1e-4)


def test_the_fewer_pages_stand_out_the_lower_it_is() -> None:
    rows = [[1.0] * peaks + [0.0] * (400 - peaks) for peaks in (1, 4, 20, 100)]
    found = [density(row) for row in rows]
    assert found == sorted(found)
    assert found[0] < 0.1
    assert found[-1] > 0.7


def test_plain_cosines_say_nothing() -> None:
    """Why scores are standardised: the released formula is 1 within 1% whatever the cosines."""
    cosines = torch.randn(1, 4, 1000).clamp(-4, 4) / 8
    cosines[0, 0, 17] = 1.0  # a page that is just what the window asks for
    log_p = cosines.double().log_softmax(-1)
    plain = -(log_p.exp() * log_p).sum(-1) / math.log(1000)
    found = densities(cosines)
    assert plain.min() > 0.99
    assert plain.max() - plain.min() < 0.003
    assert found[0, 0] < found[0, 1:].min() - 0.05


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([1.0, NAN, 3.0, 2.0], [1.0, 3.0, 2.0]),
        ([INF, 1.0, 3.0, -INF], [1.0, 3.0]),
        ([-NAN, 1.0, 1.0], [1.0, 1.0]),
    ],
    ids=str,
)
def test_bad_scores_are_left_out(scores: list[float], kept: list[float]) -> None:
    assert density(scores) == density(kept)


@pytest.mark.parametrize("scores", [[], [4.0], [NAN, NAN], [INF, 2.0], [-INF] * 5], ids=str)
def test_less_than_two_pages_have_none(scores: list[float]) -> None:
    assert math.isnan(density(scores))


def test_each_window_has_its_own_pages() -> None:
    scores = torch.randn(2, 1, 50)
    found = torch.zeros(2, 1)
    arguments = np.array([0, 2], np.int32), np.array([4, 0, 1]), np.array([54, 0, 9])
    _densities(1, scores.numpy(), *arguments, np.float32(0.5), found.numpy())
    assert found[0] == densities(scores)[0]
    assert found[1] == densities(scores[1:, :, :8])[0]
