"""Scores by summaries of pages: as accurate as plain torch, and never NaN for want of a page."""

from __future__ import annotations

import pytest
import torch

from kvplug.index.minmax import MinMaxIndex
from kvplug.kernels.bound_scores import (
    bound_scores,
    bound_scores_reference,
    mean_scores,
    mean_scores_reference,
)
from kvplug.probe.base import Probes
from kvplug.stage import Layer
from tests.caches import KeyCache
from tests.kernels.accuracy import EPS, assert_accurate
from tests.kernels.far import NUM_PAGES, Windows, windows_of
from tests.made_up import layer_shape
from tests.steps import Far

SHAPES = pytest.mark.parametrize(
    ("heads", "probes", "dim", "dtype"),
    [
        (1, 1, 64, torch.float32),
        (3, 3, 80, torch.float32),
        (2, 8, 96, torch.bfloat16),
        (2, 4, 128, torch.bfloat16),
        (1, 4, 256, torch.float16),
    ],
    ids=["g1-d64", "g3-d80", "g8-d96-bf16", "g4-d128-bf16", "g4-d256-fp16"],
)
MODES = pytest.mark.parametrize("is_bounds", [True, False], ids=["bounds", "means"])
SCALE = 0.125


def some_windows(probes: int, device: str) -> Windows:
    """Long, empty, unused, of one page, with fewer probes."""
    far = [Far(1, 2, 41), Far(0, 7, 7), Far(0, 0, 30), Far(0, 5, 6), Far(1, 1, 34)]
    return windows_of(far, [probes, probes, 0, 1, max(probes - 1, 1)], device)


def summaries_of(is_bounds: bool, heads: int, dim: int) -> torch.Tensor:
    """``[pages, Hk, 2, D]`` with minima first, or ``[pages, Hk, D]``."""
    made = torch.randn(NUM_PAGES, heads, 2, dim).bfloat16()
    return made.sort(2).values.contiguous() if is_bounds else made[:, :, 0].contiguous()


def score(
    is_bounds: bool, summaries: torch.Tensor, vectors: torch.Tensor, windows: Windows,
    pages: int = 45,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """``[S, Hk, N]`` scores by the kernel, in float32 and in float64."""
    launches = bound_scores, bound_scores_reference, mean_scores, mean_scores_reference
    kernel, twin = launches[:2] if is_bounds else launches[2:]
    shape = len(vectors), vectors.shape[1], pages
    found, plain, exact = (
        torch.empty(shape, dtype=dtype, device=vectors.device)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    given = summaries, vectors, windows.counts, windows.far, SCALE
    kernel(*given, found)
    twin(*given, plain)
    twin(*given, exact)
    return found, plain, exact


@MODES
@SHAPES
def test_accuracy(
    is_bounds: bool, heads: int, probes: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    windows = some_windows(probes, device)
    summaries = summaries_of(is_bounds, heads, dim).to(device)
    vectors = torch.randn(5, heads, probes, dim).to(device, dtype)
    for window, count in enumerate(windows.counts.tolist()):
        vectors[window, :, count:] = torch.nan
    found, plain, exact = score(is_bounds, summaries, vectors, windows)
    # Any order of the sum and the products rounds the largest score once or more.
    assert_accurate(found, plain, exact, 2 * EPS * exact[exact.isfinite()].abs().max().item())
    filled = torch.tensor([39, 0, 0, 1, 33])[:, None]
    assert (found.isfinite().sum(-1).cpu() == filled).all()
    assert not found.isnan().any()


@MODES
def test_whole_numbers_are_scored_exactly(is_bounds: bool, device: str) -> None:
    """Their products and sums are exact, so pages tie where they should."""
    windows = some_windows(4, device)
    summaries = torch.randint(-2, 3, summaries_of(is_bounds, 2, 64).shape).bfloat16()
    summaries = (summaries.sort(2).values if is_bounds else summaries).to(device)
    vectors = torch.randint(-2, 3, (5, 2, 4, 64)).float().to(device)
    found, plain, exact = score(is_bounds, summaries, vectors, windows)
    assert torch.equal(found, plain)
    assert torch.equal(found.double(), exact)
    assert len(found[0, 0].unique()) < 39


@MODES
def test_a_probe_that_is_nan_leaves_the_others(is_bounds: bool, device: str) -> None:
    """A page that no probe has a number for: minus infinity as a bound, else NaN, as on CPU."""
    windows = windows_of([Far(0, 0, 20), Far(1, 0, 20)], [3, 3], device)
    summaries = summaries_of(is_bounds, 1, 64).to(device)
    vectors = torch.randn(2, 1, 3, 64, device=device)
    expected, _, _ = score(
        is_bounds, summaries, vectors[:, :, 1:].contiguous(), windows_of_two(windows), 20
    )
    vectors[0, 0, 0, 5] = torch.nan
    vectors[1] = torch.nan
    found, _, _ = score(is_bounds, summaries, vectors, windows, 20)
    assert torch.equal(found[0], expected[0])
    assert (found[1] == -torch.inf).all() if is_bounds else found[1].isnan().all()


def windows_of_two(windows: Windows) -> Windows:
    """The same windows with two probes each."""
    return windows._replace(counts=torch.full_like(windows.counts, 2))


def test_a_page_that_is_nan_leaves_the_others(device: str) -> None:
    windows = windows_of([Far(0, 0, 20)], [2], device)
    means = summaries_of(False, 1, 64).to(device)
    vectors = torch.randn(1, 1, 2, 64, device=device)
    expected, _, _ = score(False, means, vectors, windows, 20)
    means[windows.far.pages(0)[13], 0, 63] = torch.nan
    found, _, _ = score(False, means, vectors, windows, 20)
    assert found[0, 0, 13].isnan()
    found[0, 0, 13] = expected[0, 0, 13]
    assert torch.equal(found, expected)


def test_bounds_score_as_the_index_on_cpu(device: str) -> None:
    """To the bit for whole numbers, whose sums are exact in any order."""
    shape = layer_shape(num_pages=NUM_PAGES, page=16, head_dim=64, scale=SCALE)
    index = MinMaxIndex(Layer(shape, {}, KeyCache(shape).reader()))
    bounds = torch.randint(-9, 10, (NUM_PAGES, 3, 2, 64)).sort(2).values.bfloat16()
    index.bounds.copy_(bounds)
    windows = some_windows(5, device)
    used = windows.counts.cpu() > 0
    vectors = torch.randint(-9, 10, (5, 3, 5, 64)).float()
    scores, _, _ = score(True, bounds.to(device), vectors.to(device), windows, 39)
    expected = torch.full((int(used.sum()), 3, 39), -torch.inf)
    index.score(Probes(vectors[used], windows.counts.cpu()[used]), windows.step, expected)
    assert torch.equal(scores.cpu()[used], expected)


def test_what_cannot_be_read_is_refused(device: str) -> None:
    windows = windows_of([Far(0, 0, 9)], [2], device)
    vectors, scores = torch.zeros(1, 2, 2, 64, device=device), torch.empty(1, 2, 9, device=device)
    means = summaries_of(False, 2, 64).to(device)
    with pytest.raises(ValueError, match=r"bounds must be bfloat16 \[pages, Hk, 2, D\]"):
        bound_scores(means, vectors, windows.counts, windows.far, SCALE, scores)
    with pytest.raises(ValueError, match=r"vectors must be .* \[1, 2, R, 64\]"):
        mean_scores(means, vectors[:, :, :, ::2], windows.counts, windows.far, SCALE, scores)
    with pytest.raises(ValueError, match=r"scores must be float32 \[S, 2, N\]"):
        mean_scores(means, vectors, windows.counts, windows.far, SCALE, scores.double())
