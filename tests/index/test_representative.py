"""Representative keys: the mean of the most attended, and scores by them as the twin has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.fields import build
from kvplug.index import INDEXES
from kvplug.index.local_mass import LocalMass
from kvplug.index.representative import (
    Representative,
    RepresentativeIndex,
    representative_scores_reference,
    representatives_reference,
)
from kvplug.probe.base import Probes
from kvplug.stage import Layer
from kvplug.step import Step
from tests.caches import KeyCache
from tests.made_up import layer_shape
from tests.steps import Far, step_of

PAGES, PAGE, HEADS, DIM = 40, 8, 3, 24
SCALE = 0.25
NAN = float("nan")


@dataclass
class Made:
    """An index, the mass it goes by, and the keys of its cache ``[pages, P, Hk, D]``."""

    index: RepresentativeIndex
    mass: torch.Tensor
    keys: torch.Tensor
    cache: KeyCache

    def seal(self, step: Step) -> None:
        """Lets the index summarise what a step leaves behind."""
        self.cache.seal(step, self.index)


def made(keys: torch.Tensor, stage: Representative | None = None) -> Made:
    """An index over a cache of these keys, ``[pages, P, Hk, D]``."""
    pages, page, heads, dim = keys.shape
    shape = layer_shape(num_pages=pages, page=page, num_kv_heads=heads, head_dim=dim)
    cache = KeyCache(shape)
    cache.packed.copy_(keys.permute(0, 2, 3, 1))
    layer = Layer(shape, {}, cache.reader())
    index = (stage or Representative()).for_layer(layer)
    return Made(index, layer.own(LocalMass).mass, keys, cache)


def whole_numbers(*shape: int) -> torch.Tensor:
    """Multiples of 8, whose means over 4 and 8 are exact in bfloat16."""
    return 8.0 * torch.randint(-9, 10, shape)


def test_four_dominant_keys() -> None:
    keys = whole_numbers(PAGES, PAGE, HEADS, DIM)
    it = made(keys)
    it.mass.uniform_(0, 1)
    dominant = torch.tensor([[0, 2, 5, 7], [1, 2, 3, 4], [4, 5, 6, 7]])
    for head in range(HEADS):
        it.mass[11, head, dominant[head]] += 5
    it.seal(step_of([Far(0, 9, 14)]))
    for head in range(HEADS):
        wanted = keys[11, dominant[head], head].mean(0)
        assert torch.equal(it.index.vectors[11, head].float(), wanted)


def test_of_equal_keys_the_newer_count() -> None:
    keys = whole_numbers(PAGES, PAGE, HEADS, DIM)
    it = made(keys)
    it.mass[3] = torch.tensor([1.0, 0, 2, 1, 0, 1, 1, 0])
    it.seal(step_of([Far(0, 3, 4)]))
    assert torch.equal(it.index.vectors[3].float(), keys[3, [2, 3, 5, 6]].mean(0))


@pytest.mark.parametrize("top", [1, 4, PAGE, 100])
def test_without_mass_all_keys_count(top: int) -> None:
    keys = whole_numbers(PAGES, PAGE, HEADS, DIM)
    it = made(keys, Representative(top=top))
    it.seal(step_of([Far(0, 0, PAGES)]))
    assert torch.equal(it.index.vectors.float(), keys.mean(1))


@pytest.mark.parametrize("top", [1, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("page", [1, 5, 8, 16])
def test_twin(page: int, top: int) -> None:
    keys = torch.randn(PAGES, page, HEADS, DIM)
    it = made(keys, Representative(top=top))
    it.mass.copy_(torch.randint(0, 4, it.mass.shape))
    it.mass[5:9] = 0
    it.seal(step_of([Far(0, 2, PAGES)]))
    wanted = representatives_reference(keys, it.mass, top)[2:]
    error = (it.index.vectors[2:].float() - wanted).abs()
    assert (error <= wanted.abs() * torch.finfo(torch.bfloat16).eps / 2 + 1e-6).all()
    assert (it.index.vectors[:2] == 0).all()


def test_a_page_is_settled_once() -> None:
    """And anew once it holds something else."""
    it = made(whole_numbers(PAGES, PAGE, HEADS, DIM))
    it.mass[:, :, :4] = 1
    it.seal(step_of([Far(0, 0, 7)]))
    before = it.index.vectors.clone()
    it.mass[:, :, 4:] = 2
    it.seal(step_of([Far(0, 0, 7), Far(0, 0, 7)]))
    assert torch.equal(it.index.vectors, before)
    it.cache.seals.reset(np.array([5 * PAGE]), PAGE)
    it.seal(step_of([Far(0, 0, 7)]))
    assert (it.index.vectors != before).any(2).any(1).nonzero().flatten().tolist() == [5]
    assert torch.equal(it.index.vectors[5].float(), it.keys[5, 4:].mean(0))


def test_every_window_leaves_pages_behind() -> None:
    """Of several requests, dense or not, wherever their pages lie."""
    it = made(whole_numbers(PAGES, PAGE, HEADS, DIM))
    table = torch.stack([torch.randperm(PAGES), torch.randperm(PAGES)]).to(torch.int32)
    it.seal(step_of([Far(1, 1, 3, sparse=False), Far(1, 1, 9), Far(0, 1, 5)], table))
    settled = {*table[1, 1:9].tolist(), *table[0, 1:5].tolist()}
    assert set(it.cache.seals.flags.nonzero().flatten().tolist()) == settled
    for page in settled:
        assert torch.equal(it.index.vectors[page].float(), it.keys[page].mean(0))


def scored(index: RepresentativeIndex, probes: torch.Tensor) -> torch.Tensor:
    """``[Hk, pages]`` for one window over all pages, where they lie."""
    pages = index.shape.num_pages
    scores = torch.full((1, index.shape.num_kv_heads, pages), NAN)
    counts = torch.tensor([probes.shape[1]], dtype=torch.int32)
    index.score(Probes(probes[None], counts), step_of([Far(0, 0, pages)]), scores)
    return scores[0]


STAGES = [
    Representative(metric=metric, heads=heads, reduce=reduce)
    for metric in ("dot", "cosine")
    for heads in ("each", "all")
    for reduce in ("sum", "max")
]


@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize("probes", [1, 2, 9])
@pytest.mark.parametrize("dim", [1, 24, 64])
def test_scores_twin(stage: Representative, probes: int, dim: int) -> None:
    it = made(torch.randn(PAGES, PAGE, HEADS, dim), stage)
    it.seal(step_of([Far(0, 0, PAGES)]))
    vectors = torch.randn(HEADS, probes, dim)
    wanted = representative_scores_reference(it.index.vectors, vectors, stage, SCALE)
    longest = 1.0 if stage.metric == "cosine" else SCALE * vectors.norm(dim=-1).max() * dim**0.5
    terms = HEADS * probes * dim
    bound = terms * torch.finfo(torch.float32).eps * longest
    assert (scored(it.index, vectors) - wanted).abs().max() <= bound


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_scores_are_dot_products(stage: Representative) -> None:
    """By hand: pages of one key each, probes that are unit vectors."""
    keys = torch.zeros(2, 1, 2, 16)
    keys[0, 0, :, :4] = torch.tensor([[3.0, 4, 0, 0], [0, 0, 5, 0]])
    keys[1, 0, :, :4] = torch.tensor([[-8.0, 6, 0, 0], [0, 0, 0, 0]])
    it = made(keys, stage)
    it.seal(step_of([Far(0, 0, 2)]))
    probes = torch.zeros(2, 2, 16)
    probes[0, 0, 0] = probes[0, 1, 1] = probes[1, 0, 2] = 1
    probes[1, 1, 2] = 2
    of_heads = {
        ("dot", "sum"): [[7.0, -2.0], [15.0, 0.0]],
        ("dot", "max"): [[4.0, 6.0], [10.0, 0.0]],
        ("cosine", "sum"): [[1.4, -0.2], [2.0, 0.0]],
        ("cosine", "max"): [[0.8, 0.6], [1.0, 0.0]],
    }
    wanted = torch.tensor(of_heads[stage.metric, stage.reduce])
    if stage.metric == "dot":
        wanted *= SCALE
    if stage.heads == "all":
        wanted = wanted.sum(0).expand(2, 2)
    assert torch.allclose(scored(it.index, probes), wanted, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_windows_are_scored_apart(stage: Representative) -> None:
    """Each has its own request, far range and number of probes; the rest is left alone."""
    it = made(torch.randn(PAGES, PAGE, HEADS, DIM), stage)
    it.seal(step_of([Far(0, 0, PAGES)]))
    table = torch.stack([torch.randperm(PAGES), torch.randperm(PAGES)]).to(torch.int32)
    far = [Far(1, 2, 30), Far(0, 0, 0, sparse=False), Far(0, 5, 6), Far(1, 0, PAGES)]
    counts = torch.tensor([3, 1, 2], dtype=torch.int32)
    vectors = torch.randn(3, HEADS, 3, DIM)
    for w, count in enumerate(counts):
        vectors[w, :, count:] = NAN
    scores = torch.full((3, HEADS, PAGES), -5.0)
    it.index.score(Probes(vectors, counts), step_of(far, table), scores)
    for w, window in enumerate((far[0], far[2], far[3])):
        pages = table[window.request, window.begin : window.end].long()
        alone = scored(it.index, vectors[w, :, : counts[w]].contiguous())
        assert torch.equal(scores[w, :, : len(pages)], alone[:, pages])
        assert (scores[w, :, len(pages) :] == -5).all()


@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_bad_keys_cost_their_own_page(stage: Representative, bad: float) -> None:
    keys = torch.randn(PAGES, PAGE, HEADS, DIM)
    keys[7, 3, 1] = bad
    it = made(keys, stage)
    it.mass[:, :, 3] = 1
    it.seal(step_of([Far(0, 0, PAGES)]))
    scores = scored(it.index, torch.ones(HEADS, 2, DIM))
    others = np.delete(np.arange(PAGES), 7)
    assert scores[:, others].isfinite().all()
    assert not scores[1, 7].isfinite()
    if stage.heads == "each":
        assert scores[[0, 2], 7].isfinite().all()


def test_options_are_checked() -> None:
    assert INDEXES.get("representative") is Representative
    with pytest.raises(KvplugError, match="top >= 1, not 0"):
        Representative(top=0)
    for field, value in (("metric", "dots"), ("heads", "every"), ("reduce", "mean")):
        with pytest.raises(KvplugError, match=f"unknown {field} '{value}'"):
            build(Representative, "index", {field: value})


def test_bytes_per_token() -> None:
    """A bfloat16 vector per page and head."""
    it = made(torch.zeros(PAGES, PAGE, HEADS, DIM))
    assert it.index.bytes_per_token() == HEADS * DIM * 2 / PAGE
