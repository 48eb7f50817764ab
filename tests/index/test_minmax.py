"""Min/max bounds: the twin agrees, and a bound is a bound whatever the keys' dtype and sign."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.index.minmax import MinMaxIndex, minmax_scores_reference
from kvplug.probe.base import Probes
from kvplug.stage import Layer
from tests.caches import KeyCache, fill
from tests.made_up import layer_shape
from tests.steps import Far, step_of

PAGE, DIM, HEADS = 4, 6, 2
BF16 = torch.finfo(torch.bfloat16)


def index_of(
    pages: int = 12, page: int = PAGE, dim: int = DIM, heads: int = HEADS, scale: float = 1.0
) -> MinMaxIndex:
    shape = {"num_pages": pages, "num_kv_heads": heads, "page": page, "head_dim": dim}
    made = layer_shape(**shape, scale=scale)
    return MinMaxIndex(Layer(made, {}, KeyCache(made).reader()))


def scores_of(index: MinMaxIndex, probes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``[Hk, N]`` for one window over all pages of the table."""
    heads, count = probes.shape[:2]
    scores = torch.full((1, heads, table.shape[1]), float("nan"))
    step = step_of([Far(0, 0, table.shape[1])], table)
    index.score(Probes(probes[None], torch.tensor([count], dtype=torch.int32)), step, scores)
    return scores[0]


def every_page(pages: int) -> torch.Tensor:
    return torch.arange(pages, dtype=torch.int32)[None]


@pytest.mark.parametrize("probes", [1, 2, 7])
@pytest.mark.parametrize(("pages", "page", "dim"), [(1, 1, 1), (7, 5, 6), (12, 3, 64)])
def test_twin(pages: int, page: int, dim: int, probes: int) -> None:
    """Small integers are exact in bfloat16, and so are their sums in float32."""
    index = index_of(12, page, dim)
    keys = torch.randint(-9, 10, (pages * page, HEADS, dim)).float()
    vectors = torch.randint(-9, 10, (HEADS, probes, dim)).float()
    table = torch.randperm(12).to(torch.int32)[None, :pages]
    fill(index, keys, table[0])
    found = scores_of(index, vectors, table)
    assert torch.equal(found, minmax_scores_reference(keys, vectors, page))


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_scores_are_on_the_scale_of_logits(scale: float) -> None:
    """Of one key a page, they are its logits."""
    index = index_of(page=1, scale=scale)
    keys = torch.randint(-9, 10, (12, HEADS, DIM)).float()
    vectors = torch.randint(-9, 10, (HEADS, 1, DIM)).float()
    fill(index, keys, torch.arange(12))
    found = scores_of(index, vectors, every_page(12))
    assert torch.equal(found, scale * torch.einsum("hrd,nhd->hn", vectors, keys))
    assert torch.equal(found, minmax_scores_reference(keys, vectors, 1, scale))


def test_twin_on_bfloat16_keys() -> None:
    index = index_of()
    keys = torch.randn(12 * PAGE, HEADS, DIM).bfloat16().float()
    vectors = torch.randn(HEADS, 3, DIM)
    fill(index, keys, torch.arange(12))
    expected = minmax_scores_reference(keys, vectors, PAGE)
    # DIM float32 additions of terms of order 1.
    bound = DIM * torch.finfo(torch.float32).eps * (vectors.abs().sum(-1).amax() * keys.abs().max())
    assert (scores_of(index, vectors, every_page(12)) - expected).abs().max() <= bound


def test_windows_are_scored_apart() -> None:
    index = index_of()
    keys = torch.randint(-9, 10, (12 * PAGE, HEADS, DIM)).float()
    fill(index, keys, torch.arange(12))
    table = torch.stack([torch.randperm(12), torch.randperm(12)]).to(torch.int32)
    far = [Far(1, 2, 11), Far(0, 0, 0, sparse=False), Far(0, 5, 6), Far(1, 0, 12)]
    counts = torch.tensor([3, 1, 2], dtype=torch.int32)
    vectors = torch.randint(-9, 10, (3, HEADS, 3, DIM)).float()
    for w, count in enumerate(counts):
        vectors[w, :, count:] = 1e9
    scores = torch.full((3, HEADS, 12), -5e5)
    index.score(Probes(vectors, counts), step_of(far, table), scores)
    for w, window in enumerate((far[0], far[2], far[3])):
        pages = table[window.request, window.begin : window.end].long()
        paged = keys.unflatten(0, (12, PAGE))[pages].flatten(0, 1)
        expected = minmax_scores_reference(paged, vectors[w, :, : counts[w]], PAGE)
        assert torch.equal(scores[w, :, : len(pages)], expected)
        assert (scores[w, :, len(pages) :] == -5e5).all()


AWKWARD = [
    *(0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, -1e-40, 1.17e-38, -1.17e-38, 3e38, -3e38),
    *(1.00390625, -1.00390625, 1.0000001, -1.0000001, 0.1, -0.1, 65504.0, -65504.0),
]
FLOATS = st.one_of(
    st.sampled_from(AWKWARD), st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-2, 2, width=32)
)


@given(st.lists(FLOATS, min_size=PAGE, max_size=PAGE))
@settings(max_examples=300, deadline=None)
def test_bounds_enclose_the_keys_and_no_more(values: list[float]) -> None:
    """Rounded outwards, to the nearest bfloat16 on that side."""
    index = index_of(1, PAGE, 1, 1)
    keys = torch.tensor(values).view(PAGE, 1, 1)
    fill(index, keys, torch.arange(1))
    low, high = index.bounds.float().flatten().tolist()
    least, most = keys.min().item(), keys.max().item()
    assert low <= least
    assert high >= most
    around = torch.tensor([low, high]).bfloat16()
    inner = torch.nextafter(around, around.flip(0)).tolist()
    exact = torch.tensor([least, most]).bfloat16().tolist() == [least, most]
    if exact:
        assert [low, high] == [least, most]
    if low < high:
        assert inner[0] > least or low == least
        assert inner[1] < most or high == most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [-3.0, 0.0, 3.0])
def test_a_score_bounds_every_product_of_its_page(dtype: torch.dtype, offset: float) -> None:
    index = index_of(40, 8, 32)
    keys = (torch.randn(320, HEADS, 32) + offset).to(dtype).float()
    vectors = torch.randn(HEADS, 2, 32)
    fill(index, keys, torch.arange(40))
    scores = scores_of(index, vectors, every_page(40)).double()
    products = torch.einsum("thd,hrd->htr", keys.double(), vectors.double()).amax(-1)
    best = products.unflatten(1, (40, 8)).amax(-1)
    rounding = 32 * torch.finfo(torch.float32).eps * vectors.abs().sum(-1).amax() * 10
    assert (scores - best).min() >= -rounding
    assert (scores - best).max() > 0.1  # of several keys it is no tight one


def test_a_page_of_one_key_scores_its_product() -> None:
    index = index_of(page=1)
    keys = torch.randint(-9, 10, (12, HEADS, DIM)).float()
    vectors = torch.randint(-9, 10, (HEADS, 1, DIM)).float()
    fill(index, keys, torch.arange(12))
    products = torch.einsum("thd,hrd->ht", keys, vectors)
    assert torch.equal(scores_of(index, vectors, every_page(12)), products)


def test_bytes_per_token() -> None:
    assert index_of().bytes_per_token() == HEADS * 2 * DIM * BF16.bits / 8 / PAGE
