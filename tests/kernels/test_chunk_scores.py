"""Scores on two levels: which chunks are looked into is exact, their pages' logits accurate."""

from __future__ import annotations

import math

import pytest
import torch

from kvplug.index.chunk_mean import ChunkMean
from kvplug.kernels import chunk_scores as module
from kvplug.kernels.chunk_scores import ChunkScratch, Looks, chunk_scores, chunk_scores_reference
from kvplug.probe.base import Probes
from kvplug.stage import Layer
from tests.caches import KeyCache
from tests.kernels.accuracy import EPS, assert_accurate
from tests.kernels.far import NUM_PAGES, Windows, windows_of
from tests.made_up import layer_shape
from tests.steps import Far

SCALE = 0.25
MODES = pytest.mark.parametrize(
    ("agree", "add"), [(False, False), (True, False), (False, True), (True, True)],
    ids=["each-max", "all-max", "each-sum", "all-sum"],
)  # fmt: skip
PAGES = 45


def some_windows(probes: int, device: str) -> Windows:
    """Long, empty, unused, of one page, with fewer probes; none begins with a chunk of 3."""
    far = [Far(1, 2, 41, 4), Far(0, 7, 7), Far(0, 0, 30), Far(0, 5, 6, 4), Far(1, 1, 34, 4)]
    return windows_of(far, [probes, probes, 0, 1, max(probes - 1, 1)], device)


def means_of(heads: int, dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of pages and of chunks, with nothing in common: ``[pages, Hk, D]`` bfloat16."""
    made = torch.randn(2, NUM_PAGES, heads, dim).bfloat16().to(device)
    return made[0], made[1]


def scratch_of(windows: int, heads: int, chunks: int, device: str) -> ChunkScratch:
    return ChunkScratch(
        torch.empty(windows, heads, chunks, device=device),
        torch.empty(windows, heads, chunks, dtype=torch.uint8, device=device),
    )


def scored(
    means: tuple[torch.Tensor, torch.Tensor], vectors: torch.Tensor, windows: Windows,
    looks: Looks, pages: int = PAGES,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """``[S, Hk, N]`` by the kernel, by its twin, and by that in float64."""
    device, (num, heads) = str(vectors.device), vectors.shape[:2]
    found, plain, exact = (
        torch.empty(num, heads, pages, dtype=dtype, device=device)
        for dtype in (torch.float32, torch.float32, torch.float64)
    )
    scratch = scratch_of(num, heads, pages // looks.per_chunk, device)
    given = *means, vectors, windows.counts, windows.far, SCALE, looks, scratch
    chunk_scores(*given, found)
    chunk_scores_reference(*given, plain)
    chunk_scores_reference(*given, exact)
    return found, plain, exact


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
    agree: bool, add: bool, heads: int, probes: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    windows, means = some_windows(probes, device), means_of(heads, dim, device)
    vectors = torch.randn(5, heads, probes, dim).to(device, dtype)
    for window, count in enumerate(windows.counts.tolist()):
        vectors[window, :, count:] = torch.nan
    looks = Looks(3, 5, agree, add)
    found, plain, exact = scored(means, vectors, windows, looks)
    # Any order of the sum and the products rounds the largest score once or more.
    assert_accurate(found, plain, exact, 2 * EPS * exact[exact.isfinite()].abs().max().item())
    # 12 and 10 whole chunks, of which 5 are looked into, and pages that are in no whole chunk.
    filled = torch.tensor([39 - 7 * 3, 0, 0, 1, 33 - 5 * 3])[:, None]
    assert (found.isfinite().sum(-1).cpu() == filled).all()
    assert not found.isnan().any()
    assert not agree or torch.equal(found, found[:, :1].expand_as(found))


@MODES
@pytest.mark.parametrize("looks", [Looks(1, 4), Looks(4, 1), Looks(7, 99), Looks(60, 1)], ids=str)
def test_whole_numbers_are_scored_exactly(
    looks: Looks, agree: bool, add: bool, device: str
) -> None:
    """Their sums are exact in any order, and chunks tie, where the newest wins."""
    windows = some_windows(4, device)
    means = tuple(torch.randint(-1, 2, (NUM_PAGES, 2, 64)).bfloat16().to(device) for _ in range(2))
    vectors = torch.randint(-1, 2, (5, 2, 4, 64)).float().to(device)
    looks = looks._replace(agree=agree, add=add)
    found, plain, exact = scored((means[0], means[1]), vectors, windows, looks)
    assert torch.equal(found.isfinite(), exact.isfinite())
    known = exact.isfinite()
    # A mean of fewer than 3 windows' 3 probes divides, once.
    assert torch.allclose(found[known], plain[known], rtol=2 * EPS, atol=0)


def test_more_chunks_than_a_program_ranks_in_a_step(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, means = some_windows(2, device), means_of(2, 64, device)
    vectors = torch.randn(5, 2, 2, 64, device=device)
    expected = scored(means, vectors, windows, Looks(2, 6))[0]
    monkeypatch.setattr(module, "BLOCK_C", 8)
    assert torch.equal(scored(means, vectors, windows, Looks(2, 6))[0], expected)


@MODES
def test_what_is_no_number_ranks_last(agree: bool, add: bool, device: str) -> None:
    """A chunk without a number is looked into after all others; a page's score stays NaN."""
    windows, (means, chunks) = windows_of([Far(0, 0, 12)], [2], device), means_of(2, 64, device)
    pages = windows.far.pages(0)
    vectors = torch.ones(1, 2, 2, 64, device=device)
    chunks[:] = -1
    means[:] = 1
    chunks[pages[[3, 7]]] = torch.nan  # the ends of the first two chunks of 4
    means[pages[9], :, 5] = torch.nan
    found = scored((means, chunks), vectors, windows, Looks(4, 1, agree, add), 12)[0]
    assert (found[:, :, :8] == -torch.inf).all()
    assert found[:, :, 9].isnan().all()
    assert (found[:, :, [8, 10, 11]] == SCALE * 64).all()
    found = scored((means, chunks), vectors, windows, Looks(4, 2, agree, add), 12)[0]
    assert (found[:, :, :4] == -torch.inf).all()
    assert (found[:, :, 4:8] == SCALE * 64).all()


@MODES
@pytest.mark.parametrize("per_chunk", [3, 8])
def test_the_index_on_cpu_scores_the_same(
    per_chunk: int, agree: bool, add: bool, device: str
) -> None:
    """The same chunks, and scores within rounding, from the index's own means."""
    shape = layer_shape(num_pages=NUM_PAGES, page=16, head_dim=64, scale=SCALE)
    options = ChunkMean(per_chunk, 2.0, "all" if agree else "each", "sum" if add else "max")
    cache = KeyCache(shape)
    index = options.for_layer(Layer(shape, {}, cache.reader()))
    windows = some_windows(5, device)
    cache.packed.normal_()
    cache.seal(windows.step, index)
    vectors = torch.randn(5, 3, 5, 64)
    used = windows.counts.cpu() > 0
    expected = torch.full((int(used.sum()), 3, 39), -torch.inf)
    index.score(Probes(vectors[used], windows.counts.cpu()[used]), windows.step, expected)
    wanted = math.ceil(2.0 * 4 / per_chunk)
    means = index.means.to(device), index.chunks.to(device)
    found, _, _ = scored(means, vectors.to(device), windows, Looks(per_chunk, wanted, agree, add))
    mine = found.cpu()[used, :, :39]
    assert torch.equal(mine.isfinite(), expected.isfinite())
    known = expected.isfinite()
    assert (mine - expected)[known].abs().max() < 64 * EPS * SCALE * 5
    assert (mine[0] == -torch.inf).any()


def test_what_cannot_be_read_is_refused(device: str) -> None:
    windows = windows_of([Far(0, 0, 9)], [2], device)
    vectors, scores = torch.zeros(1, 2, 2, 64, device=device), torch.empty(1, 2, 9, device=device)
    means, chunks = means_of(2, 64, device)
    given = vectors, windows.counts, windows.far, SCALE
    scratch = scratch_of(1, 2, 4, device)
    with pytest.raises(ValueError, match=r"chunks must be bfloat16 \[50, 2, 64\]"):
        chunk_scores(means, chunks[1:], *given, Looks(2, 1), scratch, scores)
    with pytest.raises(ValueError, match=r"scratch.scores must be float32 \[1, 2, 3\]"):
        chunk_scores(means, chunks, *given, Looks(3, 1), scratch, scores)
    with pytest.raises(ValueError, match="at least one page a chunk and one chunk"):
        chunk_scores(means, chunks, *given, Looks(2, 0), scratch, scores)
