"""Scores by representatives: as accurate as plain torch's, and those of the index on CPU."""

from __future__ import annotations

import pytest
import torch

from kvplug.index.representative import Representative
from kvplug.kernels.representative_scores import (
    Ranking,
    representative_scores,
    representative_scores_reference,
)
from kvplug.probe.base import Probes
from kvplug.stage import Layer
from tests.caches import KeyCache
from tests.kernels.accuracy import EPS, assert_accurate
from tests.kernels.far import NUM_PAGES, Windows, windows_of
from tests.made_up import layer_shape
from tests.steps import Far

SCALE = 0.25
MODES = pytest.mark.parametrize(
    "ranking",
    [
        Ranking(cosine, agree, add)
        for cosine in (False, True)
        for agree in (False, True)
        for add in (False, True)
    ],
    ids=str,
)


def some_windows(probes: int, device: str) -> Windows:
    """Long, empty, unused, of one page, with fewer probes."""
    far = [Far(1, 2, 41), Far(0, 7, 7), Far(0, 0, 30), Far(0, 5, 6), Far(1, 1, 34)]
    return windows_of(far, [probes, probes, 0, 1, max(probes - 1, 1)], device)


def scored(
    keys: torch.Tensor, vectors: torch.Tensor, windows: Windows, ranking: Ranking, pages: int = 45
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[S, Hk, N]`` by the kernel, by its twin, and by that in float64."""
    size = (*vectors.shape[:2], pages)
    found, plain, exact = (
        torch.empty(size, dtype=dtype, device=vectors.device)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    given = keys, vectors, windows.counts, windows.far, SCALE, ranking
    representative_scores(*given, found)
    representative_scores_reference(*given, plain)
    representative_scores_reference(*given, exact)
    return found, plain, exact


def keys_of(heads: int, dim: int, device: str) -> torch.Tensor:
    """``[pages, Hk, D]``, of which one has no direction."""
    made = torch.randn(NUM_PAGES, heads, dim).bfloat16()
    made[11] = 0
    return made.to(device)


@MODES
@pytest.mark.parametrize(
    ("heads", "probes", "dim", "dtype"),
    [
        (1, 1, 64, torch.float32), (2, 3, 80, torch.float32), (2, 4, 128, torch.bfloat16),
        (1, 8, 256, torch.float16),
    ],
    ids=["g1", "g3-d80", "g4-bf16", "g8-d256-fp16"],
)  # fmt: skip
def test_accuracy(
    ranking: Ranking, heads: int, probes: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    windows, keys = some_windows(probes, device), keys_of(heads, dim, device)
    vectors = torch.randn(5, heads, probes, dim).to(device, dtype)
    for window, count in enumerate(windows.counts.tolist()):
        vectors[window, :, count:] = torch.nan
    found, plain, exact = scored(keys, vectors, windows, ranking)
    # Any order of the sums and the products rounds the largest score a few times.
    assert_accurate(found, plain, exact, 4 * EPS * exact[exact.isfinite()].abs().max().item())
    filled = torch.tensor([39, 0, 0, 1, 33])[:, None]
    assert (found.isfinite().sum(-1).cpu() == filled).all()
    assert not ranking.agree or torch.equal(found, found[:, :1].expand_as(found))


@MODES
@pytest.mark.parametrize("probes", [1, 5])
def test_the_index_on_cpu_scores_the_same(ranking: Ranking, probes: int, device: str) -> None:
    """From the index's own representatives, within the rounding of sums in another order."""
    options = Representative(
        metric="cosine" if ranking.cosine else "dot", heads="all" if ranking.agree else "each",
        reduce="sum" if ranking.add else "max",
    )  # fmt: skip
    shape = layer_shape(num_pages=NUM_PAGES, page=16, head_dim=64, scale=SCALE)
    cache, windows = KeyCache(shape), some_windows(probes, device)
    index = options.for_layer(Layer(shape, {}, cache.reader()))
    cache.packed.normal_()
    cache.seal(windows.step, index)
    vectors, used = torch.randn(5, 3, probes, 64), windows.counts.cpu() > 0
    expected = torch.full((int(used.sum()), 3, 39), -torch.inf)
    index.score(Probes(vectors[used], windows.counts.cpu()[used]), windows.step, expected)
    found = scored(index.vectors.to(device), vectors.to(device), windows, ranking)[0]
    mine = found.cpu()[used, :, :39]
    assert torch.equal(mine.isfinite(), expected.isfinite())
    known, largest = expected.isfinite(), 1.0 if ranking.cosine else SCALE * 64
    assert (mine - expected)[known].abs().max() <= 3 * probes * 64 * EPS * largest
    assert len(mine[0, 0].unique()) == 39


@MODES
def test_what_is_no_number_costs_its_own_page(ranking: Ranking, device: str) -> None:
    windows, keys = windows_of([Far(0, 0, 20)], [2], device), keys_of(2, 64, device)
    vectors = torch.randn(1, 2, 2, 64, device=device)
    expected = scored(keys, vectors, windows, ranking, 20)[0]
    keys[windows.far.pages(0)[13], 1, 63] = torch.nan
    found = scored(keys, vectors, windows, ranking, 20)[0]
    assert found[0, 1, 13].isnan()
    assert found[0, 0, 13].isnan() or not ranking.agree
    found[0, :, 13] = expected[0, :, 13]
    assert torch.equal(found, expected)


@MODES
def test_a_probe_that_is_nan(ranking: Ranking, device: str) -> None:
    """It leaves the others of its head where the largest counts; a sum is none then."""
    windows, keys = windows_of([Far(0, 0, 20)], [3], device), keys_of(1, 64, device)
    vectors = torch.randn(1, 1, 3, 64, device=device)
    two = windows._replace(counts=torch.full_like(windows.counts, 2))
    expected = scored(keys, vectors[:, :, 1:].contiguous(), two, ranking, 20)[0]
    vectors[0, 0, 0, 5] = torch.nan
    found = scored(keys, vectors, windows, ranking, 20)[0]
    if ranking.add:
        assert found.isnan().all()
    else:
        assert torch.equal(found, expected)


def test_what_cannot_be_read_is_refused(device: str) -> None:
    windows, keys = windows_of([Far(0, 0, 9)], [2], device), keys_of(2, 64, device)
    vectors, scores = torch.zeros(1, 2, 2, 64, device=device), torch.empty(1, 2, 9, device=device)
    given = windows.counts, windows.far, SCALE, Ranking()
    with pytest.raises(ValueError, match=r"representatives must be bfloat16 \[pages, 2, 64\]"):
        representative_scores(keys.float(), vectors, *given, scores)
    with pytest.raises(ValueError, match=r"vectors must be .* \[1, 2, R, 64\]"):
        representative_scores(keys, vectors[:, :, :, ::2], *given, scores)
