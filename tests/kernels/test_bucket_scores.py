"""Scores by buckets: whole numbers of rounds, to the bit, as the index on CPU has them."""

from __future__ import annotations

import pytest
import torch

from kvplug.index.buckets import BucketIndex, Buckets
from kvplug.index.buckets import bucket_scores_reference as on_cpu
from kvplug.kernels.bucket_scores import bucket_masks, bucket_scores, bucket_scores_reference
from kvplug.stage import Layer
from tests.caches import KeyCache
from tests.kernels.far import NUM_PAGES, Windows, windows_of
from tests.made_up import layer_shape
from tests.steps import Far

ANY = (-(2**63), 2**63 - 1)
BUCKETS = pytest.mark.parametrize(
    ("bits", "rounds"), [(2, 32), (1, 64), (64, 1), (8, 8), (3, 21), (5, 4), (1, 1)]
)


def some_windows(probes: int, device: str) -> Windows:
    """Long, empty, unused, of one page, with fewer probes."""
    far = [Far(1, 2, 41), Far(0, 7, 7), Far(0, 0, 30), Far(0, 5, 6), Far(1, 1, 34)]
    return windows_of(far, [probes, probes, 0, 1, max(probes - 1, 1)], device)


def scored(
    words: torch.Tensor, asked: torch.Tensor, windows: Windows, bits: int, rounds: int
) -> list[torch.Tensor]:
    """``[S, Hk, N]`` by the kernel and by its twin."""
    out = [torch.empty(*asked.shape[:2], 45, device=asked.device) for _ in range(2)]
    masks = bucket_masks(bits, rounds, asked.device)
    for function, found in zip((bucket_scores, bucket_scores_reference), out, strict=True):
        function(words, asked, windows.counts, windows.far, rounds, masks, found)
    return out


@BUCKETS
@pytest.mark.parametrize(
    ("page", "heads", "probes"), [(16, 1, 1), (32, 2, 3), (128, 1, 8)], ids=["p16", "p32", "p128"]
)
def test_twin(page: int, heads: int, probes: int, bits: int, rounds: int, device: str) -> None:
    windows = some_windows(probes, device)
    words = torch.randint(*ANY, (NUM_PAGES, heads, page)).to(device)
    asked = torch.randint(*ANY, (5, heads, probes)).to(device)
    words[windows.far.pages(0)[7], :, 3] = asked[0, :, 0]
    found, expected = scored(words, asked, windows, bits, rounds)
    assert torch.equal(found, expected)
    assert (found[0, :, 7] == rounds).all()
    filled = torch.tensor([39, 0, 0, 1, 33])[:, None]
    assert (found.isfinite().sum(-1).cpu() == filled).all()


@BUCKETS
def test_the_index_on_cpu_meets_as_often(bits: int, rounds: int, device: str) -> None:
    """From words of whole numbers' signs, which have one value in any order of sums."""
    shape = layer_shape(num_pages=NUM_PAGES, page=16, head_dim=64)
    index = Buckets(bits, rounds).for_layer(Layer(shape, {}, KeyCache(shape).reader()))
    assert isinstance(index, BucketIndex)
    planes = torch.randint(-8, 9, (3, 64, 64)).float() + 0.5
    keys = torch.randint(-8, 9, (NUM_PAGES, 16, 3, 64)).float()
    probes = torch.randint(-8, 9, (3, 2, 64)).float()

    def words_of(vectors: torch.Tensor) -> torch.Tensor:
        above = torch.einsum("...hd,hdb->...hb", vectors, planes) > 0
        return (above.long() << torch.arange(64)).sum(-1)

    windows = windows_of([Far(0, 2, 40)], [2], device)
    words = words_of(keys).transpose(1, 2).contiguous()  # [pages, Hk, P]
    asked = words_of(probes.transpose(0, 1)).T[None].contiguous()  # [1, Hk, R]
    found, _ = scored(words.to(device), asked.to(device), windows, bits, rounds)
    mine = keys[windows.far.pages(0).cpu()].flatten(0, 1)
    expected = on_cpu(mine, probes, planes[:, :, : bits * rounds], bits, 16)
    assert torch.equal(found.cpu()[0, :, :38], expected)


def test_what_cannot_be_read_is_refused(device: str) -> None:
    windows = windows_of([Far(0, 0, 9)], [2], device)
    words = torch.zeros(NUM_PAGES, 2, 16, dtype=torch.int64, device=device)
    asked = torch.zeros(1, 2, 2, dtype=torch.int64, device=device)
    masks, scores = bucket_masks(2, 32, device), torch.empty(1, 2, 9, device=device)
    given = windows.counts, windows.far, 32
    with pytest.raises(ValueError, match="64 together, not 3, 22"):
        bucket_masks(3, 22, device)
    with pytest.raises(ValueError, match=r"masks must be int64 \[2\]"):
        bucket_scores(words, asked, *given, masks[:1], scores)
    with pytest.raises(ValueError, match=r"probes must be int64 \[1, 2, R\]"):
        bucket_scores(words, asked.int(), *given, masks, scores)
