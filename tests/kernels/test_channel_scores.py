"""Scores by channel codes: whole weights to the bit, shares as accurate as plain torch's."""

from __future__ import annotations

import pytest
import torch

from kvplug.index.channels import Channels, ChannelsIndex
from kvplug.kernels.channel_probes import PLANES, channel_probes
from kvplug.kernels.channel_scores import ChannelScratch, channel_scores, channel_scores_reference
from kvplug.probe.base import Probes
from kvplug.stage import Layer
from tests.caches import KeyCache, fill
from tests.kernels.accuracy import EPS, assert_accurate
from tests.kernels.far import NUM_PAGES, Windows, windows_of
from tests.made_up import layer_shape
from tests.steps import Far

FILLED = [21, 0, 0, 1, 17]
ANY = (-(2**63), 2**63 - 1)


def some_windows(probes: int, device: str) -> Windows:
    """Long, empty, unused, of one page, with fewer probes."""
    far = [Far(1, 2, 23), Far(0, 7, 7), Far(0, 0, 30), Far(0, 5, 6), Far(1, 1, 18)]
    return windows_of(far, [probes, probes, 0, 1, max(probes - 1, 1)], device)


def scratch(shape: tuple[int, int, int], pages: int, device: str) -> ChannelScratch:
    return ChannelScratch(
        torch.empty(*shape, pages, device=device), torch.empty(shape, device=device)
    )


def scored(
    codes: torch.Tensor, asked: torch.Tensor, units: torch.Tensor, windows: Windows, pages: int = 25
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores by the kernel, by its twin, and by that in float64. Logits agree to the bit."""
    device, shape = str(units.device), tuple(units.shape)
    found, plain, exact = (
        torch.empty(*shape[:2], pages, dtype=dtype, device=device)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    mine, theirs = scratch(shape, pages, device), scratch(shape, pages, device)
    given = codes, asked, units, windows.counts, windows.far
    channel_scores(*given, mine, found)
    channel_scores_reference(*given, theirs, plain)
    channel_scores_reference(*given, scratch(shape, pages, device), exact)
    assert torch.equal(mine.logits.nan_to_num(-7.0), theirs.logits.nan_to_num(-7.0))
    return found, plain, exact


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize(
    ("page", "heads", "probes"),
    [(16, 1, 1), (32, 2, 3), (64, 1, 8), (128, 1, 5)],
    ids=["page16", "page32-g3", "page64-g8", "page128-5-probes"],
)
def test_twin(page: int, heads: int, probes: int, words: int, device: str) -> None:
    """Random bits; one unit is 0, whose probe finds every page alike."""
    windows = some_windows(probes, device)
    codes = torch.randint(*ANY, (NUM_PAGES, heads, words, page)).to(device)
    asked = torch.randint(*ANY, (5, heads, probes, words, PLANES + 1)).to(device)
    units = torch.rand(5, heads, probes, device=device) / 4
    units[0, 0, 0] = 0
    found, plain, exact = scored(codes, asked, units, windows)
    # A share's logarithm is of numbers from 2^-126 to R, of which each rounding moves it by EPS.
    assert_accurate(found, plain, exact, 8 * EPS * exact[exact.isfinite()].abs().max().item())
    assert (found.isfinite().sum(-1).cpu() == torch.tensor(FILLED)[:, None]).all()
    assert not found.isnan().any()


def test_shares_too_small_for_floats_count_as_the_least(device: str) -> None:
    codes = torch.zeros(NUM_PAGES, 1, 1, 16, dtype=torch.int64, device=device)
    windows = windows_of([Far(0, 0, 40)], [1], device)
    codes[windows.far.pages(0)[3]] = -1
    asked = torch.full((1, 1, 1, 1, 4), -1, dtype=torch.int64, device=device)
    units = torch.ones(1, 1, 1, device=device)
    found, _, _ = scored(codes, asked, units, windows, 40)
    assert found[0, 0, 3] == 0
    others = torch.cat([found[0, 0, :3], found[0, 0, 4:]])
    assert torch.allclose(others, others.new_tensor(-126 * 0.6931472))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_probe_that_is_not_finite_scores_nothing(bad: float, device: str) -> None:
    windows = windows_of([Far(0, 0, 20), Far(1, 0, 9)], [2, 1], device)
    codes = torch.randint(1, 99, (NUM_PAGES, 2, 1, 16)).to(device)
    asked = torch.zeros(2, 2, 2, 1, 4, dtype=torch.int64, device=device)
    units = torch.ones(2, 2, 2, device=device)
    units[0, 1, 1] = bad
    found, plain, _ = scored(codes, asked, units, windows, 20)
    assert found[0, 1].isnan().all()
    assert plain[0, 1].isnan().all()
    assert found[0, 0].isfinite().all()
    assert found[1, :, :9].isfinite().all()


@pytest.mark.parametrize("bits", [64, 128])
def test_the_index_on_cpu_scores_the_same(bits: int, device: str) -> None:
    """From the index's own codes, by probes that the kernel weighs."""
    shape = layer_shape(num_pages=NUM_PAGES, page=16, head_dim=64, window=32, local=48, scale=0.1)
    index = ChannelsIndex(Channels(bits), Layer(shape, {}, KeyCache(shape).reader()))
    windows = windows_of([Far(0, 2, 30), Far(0, 1, 9)], [6, 4], device)
    pages = windows.step.block_table[0, :30]
    fill(index, torch.randn(30 * 16, 3, 64), pages)
    vectors = torch.randn(2, 3, 6, 64)
    expected = torch.full((2, 3, 28), torch.nan)
    index.score(Probes(vectors, windows.counts.cpu()), windows.step, expected)
    codes, chosen, scales = (tensor.to(device) for tensor in index.state)
    asked = torch.zeros(2, 3, 6, bits // 64, PLANES + 1, dtype=torch.int64, device=device)
    units, scores = torch.zeros(2, 3, 6, device=device), torch.empty(2, 3, 28, device=device)
    given = windows.counts, windows.far
    channel_probes(vectors.to(device), *given, chosen, scales, 0.1, asked, units)
    channel_scores(codes, asked, units, *given, scratch((2, 3, 6), 28, device), scores)
    assert (scores.cpu()[0] - expected[0]).abs().max() < 1e-4
    assert (scores.cpu()[1, :, :8] - expected[1, :, :8]).abs().max() < 1e-4


def test_scratch_of_another_shape_is_refused(device: str) -> None:
    windows = windows_of([Far(0, 0, 9)], [2], device)
    codes = torch.zeros(NUM_PAGES, 1, 2, 16, dtype=torch.int64, device=device)
    asked = torch.zeros(1, 1, 2, 2, 4, dtype=torch.int64, device=device)
    units, scores = torch.zeros(1, 1, 2, device=device), torch.empty(1, 1, 9, device=device)
    given = windows.counts, windows.far
    with pytest.raises(ValueError, match=r"scratch.logits must be float32 \[1, 1, 2, 9\]"):
        channel_scores(codes, asked, units, *given, scratch((1, 1, 2), 8, device), scores)
    with pytest.raises(ValueError, match=r"asked must be int64 \[1, 1, 2, 2, 4\]"):
        channel_scores(codes, asked.int(), units, *given, scratch((1, 1, 2), 9, device), scores)
