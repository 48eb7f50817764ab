"""Scores by sign hashes are whole numbers of bits, so kernel and twins agree to the bit."""

from __future__ import annotations

import pytest
import torch

from kvplug.index.simhash import SimHashIndex
from kvplug.kernels.far_pages import FarPages
from kvplug.kernels.hash_scores import Several, hash_scores, hash_scores_reference
from kvplug.probe.base import Probes
from kvplug.stage import Layer
from tests.caches import KeyCache
from tests.kernels.far import NUM_PAGES, Windows, windows_of
from tests.made_up import layer_shape
from tests.steps import Far

SHAPES = pytest.mark.parametrize(
    ("page", "heads", "probes"),
    [(16, 1, 1), (32, 2, 3), (64, 3, 8), (128, 1, 24)],
    ids=["page16", "page32-g3", "page64-g8", "page128-24-probes"],
)


def some_windows(probes: int, device: str, tokens: int = 1) -> Windows:
    """Long, empty, unused, of one page, with fewer probes, of two requests."""
    far = [
        Far(1, 2, 41, tokens=tokens), Far(0, 7, 7), Far(0, 0, 30), Far(0, 5, 6, tokens=tokens),
        Far(1, 1, 34, tokens=2 * tokens - 1),
    ]  # fmt: skip
    return windows_of(far, [probes, probes, 0, 1, max(probes - 1, 1)], device)


def words_of(heads: int, page: int, device: str) -> torch.Tensor:
    """``[pages, Hk, P]`` of any bits; tokens repeat, so that pages tie."""
    words = torch.randint(-(2**63), 2**63 - 1, (NUM_PAGES, heads, page))
    words[::3, :, 1] = words[0, :, 1]
    words[1, :, 0], words[2, :, 0] = -1, 0
    return words.to(device)


def probes_of(windows: Windows, words: torch.Tensor, count: int) -> torch.Tensor:
    """``[S, Hk, R]``: random, but for one that a page has and one that it has the opposite of."""
    probes = torch.randint(-(2**63), 2**63 - 1, (len(windows.counts), words.shape[1], count))
    probes[:, :, 0] = words[7, :, 3].cpu()
    probes[1:3, :, 0] = ~probes[1:3, :, 0]
    return probes.to(words.device)


def scratch(windows: Windows, heads: int, probes: int, pages: int) -> Several:
    shape = len(windows.counts), heads, probes
    device = windows.counts.device
    return Several(
        windows.several,
        torch.empty(*shape, pages, dtype=torch.uint8, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )


@SHAPES
@pytest.mark.parametrize("tokens", [1, 4], ids=["decode", "prefill"])
def test_twin(page: int, heads: int, probes: int, tokens: int, device: str) -> None:
    """With room for more pages than there are; whatever a row has no page for is no number."""
    windows, words = some_windows(probes, device, tokens), words_of(heads, page, device)
    asked = probes_of(windows, words, probes)
    scores = torch.empty(5, heads, 45, device=device)
    several = scratch(windows, heads, probes, 45) if tokens > 1 else None
    hash_scores(words, asked, windows.counts, windows.far, scores, several)
    expected = torch.empty(5, heads, 45, device=device)
    hash_scores_reference(words, asked, windows.counts, windows.far, expected, several)
    assert torch.equal(scores, expected)
    filled = [39, 0, 0, 1, 33]
    assert (scores.isfinite().sum(-1).cpu() == torch.tensor(filled)[:, None]).all()


@pytest.mark.parametrize("tokens", [1, 9], ids=["decode", "prefill"])
def test_twin_on_cpu(tokens: int, device: str) -> None:
    """The same keys and probes get the same scores as the index on CPU gives them."""
    shape = layer_shape(num_pages=NUM_PAGES, page=16, head_dim=64)
    index = SimHashIndex(Layer(shape, {}, KeyCache(shape).reader()))
    index.words.copy_(words_of(3, 16, "cpu"))
    windows = some_windows(6, device, tokens)
    used = windows.counts.cpu() > 0
    vectors = torch.randn(5, 3, 6, 64)
    signs = torch.einsum("shrd,hdb->shrb", vectors.double(), index.planes.double())
    assert signs.abs().min() > 1e-4  # no sign is in doubt
    asked = ((signs > 0).long() << torch.arange(64)).sum(-1)
    scores = torch.empty(5, 3, 39, device=device)
    several = scratch(windows, 3, 6, 39) if tokens > 1 else None
    hash_scores(
        index.words.to(device), asked.to(device), windows.counts, windows.far, scores, several
    )
    expected = torch.full((int(used.sum()), 3, 39), -torch.inf)
    index.score(Probes(vectors[used], windows.counts.cpu()[used]), windows.step, expected)
    assert torch.equal(scores.cpu()[used], expected)
    assert (scores.cpu()[~used] == -torch.inf).all()


def test_pages_that_match_to_the_bit_and_not_at_all(device: str) -> None:
    words = torch.zeros(NUM_PAGES, 1, 32, dtype=torch.int64, device=device)
    words[11, 0, 31] = -1
    windows = windows_of([Far(0, 0, 40)], [1], device)
    asked = torch.full((1, 1, 1), -1, dtype=torch.int64, device=device)
    scores = torch.empty(1, 1, 40, device=device)
    hash_scores(words, asked, windows.counts, windows.far, scores)
    expected = torch.where(windows.far.pages(0) == 11, 64.0, 0.0)
    assert torch.equal(scores[0, 0], expected)


def test_an_unused_row_is_not_looked_at(device: str) -> None:
    """Whatever stands there, as long as it has no probes."""
    column = torch.full((1,), 2**30, dtype=torch.int32, device=device)
    far = FarPages(column[None], column, torch.zeros_like(column), column)
    words = torch.zeros(1, 1, 16, dtype=torch.int64, device=device)
    asked = torch.empty(1, 1, 2, dtype=torch.int64, device=device)
    scores = torch.empty(1, 1, 3, device=device)
    several = Several(
        torch.ones(1, dtype=torch.bool, device=device),
        torch.empty(1, 1, 2, 3, dtype=torch.uint8, device=device),
        torch.empty(1, 1, 2, dtype=torch.int32, device=device),
    )
    hash_scores(words, asked, torch.zeros_like(column), far, scores, several)
    assert (scores == -torch.inf).all()


def test_scratch_of_another_shape_is_refused(device: str) -> None:
    windows = windows_of([Far(0, 0, 9, tokens=2)], [2], device)
    words = words_of(1, 16, device)
    asked = torch.zeros(1, 1, 2, dtype=torch.int64, device=device)
    scores = torch.empty(1, 1, 9, device=device)
    short = scratch(windows, 1, 2, 8)
    with pytest.raises(ValueError, match=r"several.nearest must be uint8 \[1, 1, 2, 9\]"):
        hash_scores(words, asked, windows.counts, windows.far, scores, short)
    with pytest.raises(ValueError, match=r"probes must be int64 \[1, 1, R\]"):
        hash_scores(words, asked.int(), windows.counts, windows.far, scores)
    odd = windows.far._replace(begin=windows.far.begin.long())
    with pytest.raises(ValueError, match=r"begin must be int32 \[1\]"):
        hash_scores(words, asked, windows.counts, odd, scores)
