"""Sign hashes: the twin agrees bit for bit, an equal key always ranks first, planes are fixed."""

from __future__ import annotations

import pytest
import torch

from kvplug.index.planes import BITS, draw_planes
from kvplug.index.simhash import SimHashIndex, simhash_scores_reference
from kvplug.probe.base import Probes
from kvplug.stage import Layer, LayerShape
from tests.caches import KeyCache, fill
from tests.made_up import layer_shape
from tests.steps import Far, step_of

NAN = float("nan")


def shape_of(**changed: int) -> LayerShape:
    return layer_shape(page=5, head_dim=24, layer=2, seed=7)._replace(**changed)


def index_of(shape: LayerShape) -> SimHashIndex:
    return SimHashIndex(Layer(shape, {}, KeyCache(shape).reader()))


def far_from_ties(keys: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """``[T, Hk, D]``, those redrawn whose projections float32 might round to another sign."""
    while True:
        sums = torch.einsum("thd,hdb->thb", keys.double(), planes.double())
        close = (sums.abs() < 1e-3).any(-1)
        if not close.any():
            return keys
        keys = torch.where(close[..., None], torch.randn_like(keys), keys)


def scores_of(index: SimHashIndex, probes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``[Hk, N]`` for one window over all pages of the table."""
    step = step_of([Far(0, 0, table.shape[1])], table)
    heads, count = probes.shape[:2]
    scores = torch.full((1, heads, table.shape[1]), NAN)
    index.score(Probes(probes[None], torch.tensor([count], dtype=torch.int32)), step, scores)
    return scores[0]


@pytest.mark.parametrize("probes", [1, 2, 9])
@pytest.mark.parametrize(("pages", "page", "dim"), [(1, 1, 1), (7, 5, 24), (40, 3, 64)])
def test_twin(pages: int, page: int, dim: int, probes: int) -> None:
    shape = shape_of(page=page, head_dim=dim)
    index = index_of(shape)
    keys = far_from_ties(torch.randn(pages * page, 3, dim), index.planes)
    vectors = far_from_ties(torch.randn(probes, 3, dim), index.planes).transpose(0, 1)
    table = torch.randperm(40).to(torch.int32)[None, :pages]
    fill(index, keys, table[0])
    found = scores_of(index, vectors.contiguous(), table)
    assert torch.equal(found, simhash_scores_reference(keys, vectors, index.planes, page))


def test_twin_where_projections_are_zero() -> None:
    """Small integers make every sum exact, and many of them 0: not above the plane."""
    index = index_of(shape_of())
    index.planes.copy_(torch.randint(-1, 2, index.planes.shape))
    keys = torch.randint(-1, 2, (200, 3, 24)).float()
    keys[17] = 0
    vectors = torch.randint(-1, 2, (3, 4, 24)).float()
    fill(index, keys, torch.arange(40))
    assert (torch.einsum("thd,hdb->htb", keys, index.planes) == 0).float().mean() > 0.05
    assert index.words[3, 0, 2] == 0  # of key 17
    found = scores_of(index, vectors, torch.arange(40, dtype=torch.int32)[None])
    assert torch.equal(found, simhash_scores_reference(keys, vectors, index.planes, 5))


def test_windows_are_scored_apart() -> None:
    """Each has its own request, far range and number of probes; the rest is left alone."""
    index = index_of(shape_of())
    keys = far_from_ties(torch.randn(200, 3, 24), index.planes)
    fill(index, keys, torch.arange(40))
    table = torch.stack([torch.randperm(40), torch.randperm(40)]).to(torch.int32)
    far = [Far(1, 2, 30), Far(0, 0, 0, sparse=False), Far(0, 5, 6), Far(1, 0, 40)]
    counts = torch.tensor([3, 1, 2], dtype=torch.int32)
    vectors = far_from_ties(torch.randn(9, 3, 24), index.planes).view(3, 3, 3, 24)
    vectors = vectors.transpose(1, 2).contiguous()  # [W, Hk, R, D]
    for w, count in enumerate(counts):
        vectors[w, :, count:] = NAN
    scores = torch.full((3, 3, 40), -5.0)
    index.score(Probes(vectors, counts), step_of(far, table), scores)
    for w, window in enumerate((far[0], far[2], far[3])):
        pages = table[window.request, window.begin : window.end].long()
        paged = keys.unflatten(0, (40, 5))[pages].flatten(0, 1)
        expected = simhash_scores_reference(paged, vectors[w, :, : counts[w]], index.planes, 5)
        assert torch.equal(scores[w, :, : len(pages)], expected)
        assert (scores[w, :, len(pages) :] == -5).all()


@pytest.mark.parametrize("layer", [0, 5])
@pytest.mark.parametrize("scale", [1.0, 0.25, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_equal_key_is_always_first(dtype: torch.dtype, scale: float, layer: int) -> None:
    """Scaled by powers of 2 even to the bit: hashes know directions only."""
    index = index_of(shape_of(layer=layer))
    keys = torch.randn(200, 3, 24).to(dtype).float()
    fill(index, keys, torch.arange(40))
    for token in (0, 4, 5, 99, 199):
        probe = keys[token][:, None] * scale
        scores = scores_of(index, probe, torch.arange(40, dtype=torch.int32)[None])
        assert (scores[:, token // 5] == BITS).all()
        assert (scores.argmax(1) == token // 5).all()


def test_a_window_of_several_tokens_is_asked_by_what_stands_out() -> None:
    """Every page has the sentence that one probe matches to the bit; one page has the other's key.

    The twin agrees, also where a step has windows of both kinds.
    """
    index = index_of(shape_of())
    keys = far_from_ties(torch.randn(200, 3, 24), index.planes)
    keys[::5] = keys[0]  # the first token of every page
    keys[7 * 5 + 2] = keys[61]
    fill(index, keys, torch.arange(40))
    probes = torch.stack([keys[0], keys[7 * 5 + 2]], 1)  # [Hk, 2, D]
    far = [Far(0, 0, 40, tokens=9), Far(0, 0, 12, tokens=1), Far(0, 3, 30, tokens=4)]
    scores = torch.full((3, 3, 40), NAN)
    counts = torch.tensor([2, 2, 2], dtype=torch.int32)
    index.score(Probes(probes.expand(3, -1, -1, -1).contiguous(), counts), step_of(far), scores)
    for w, window in enumerate(far):
        mine = keys[window.begin * 5 : window.end * 5]
        expected = simhash_scores_reference(mine, probes, index.planes, 5, window.tokens > 1)
        count = window.end - window.begin
        torch.testing.assert_close(scores[w, :, :count], expected, rtol=0, atol=1e-5)
        assert scores[w, :, count:].isnan().all()
    assert (scores[1, :, :12] == BITS).all(), "a single token's probes are all that asks"
    assert sorted(scores[0, 0].topk(2).indices.tolist()) == [7, 12]
    assert (scores[0].topk(2).values > 10).all()


def test_an_opposite_key_is_last() -> None:
    index = index_of(shape_of(page=1))
    keys = torch.randn(40, 3, 24)
    fill(index, keys, torch.arange(40))
    scores = scores_of(index, -keys[13][:, None], torch.arange(40, dtype=torch.int32)[None])
    assert (scores[:, 13] == 0).all()


def test_more_equal_bits_mean_a_smaller_angle() -> None:
    """The expected share of equal bits is 1 - angle / pi (Charikar 2002)."""
    index = index_of(shape_of(num_pages=400, page=10, head_dim=64))
    probe = torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    noise = torch.randn(4000, 3, 64)
    noise -= (noise * probe).sum(-1, keepdim=True) * probe
    angles = torch.linspace(0, torch.pi, 4000)[:, None]
    across = torch.nn.functional.normalize(noise, dim=-1)
    keys = angles.cos()[..., None] * probe + angles.sin()[..., None] * across
    fill(index, keys, torch.arange(400))
    signs = torch.einsum("hd,hdb->hb", probe, index.planes) > 0
    words = index.words.transpose(1, 2).flatten(0, 1)  # [T, Hk]
    equal = ((words[..., None] >> torch.arange(BITS) & 1).bool() == signs).float().mean(-1)
    # One probe's 64 signs deviate by 0.5 / sqrt(64) at most, and all its keys are compared to them.
    error = equal - (1 - angles / torch.pi)
    assert error.mean(0).abs().max() < 3 * 0.5 / BITS**0.5
    for head in range(3):
        assert torch.corrcoef(torch.stack([equal[:, head], -angles[:, 0]]))[0, 1] > 0.95


@pytest.mark.parametrize(
    "other",
    [{"seed": 8}, {"layer": 3}, {"seed": 0, "layer": 0}, {"seed": 7 + 2**32}, {"first_kv_head": 3}],
    ids=str,
)
def test_planes_differ(other: dict[str, int]) -> None:
    here, there = draw_planes(shape_of()), draw_planes(shape_of(**other))
    for head in range(3):
        for counterpart in range(3):
            assert not torch.equal(here[head], there[counterpart])


def test_planes_differ_by_head_and_layer_throughout_a_large_model() -> None:
    seen = {
        planes[0, :2].sum().item()
        for layer in range(80)
        for planes in draw_planes(shape_of(num_kv_heads=32, head_dim=2, layer=layer))[:, None]
    }
    assert len(seen) == 80 * 32


@pytest.mark.parametrize("ranks", [2, 4])
def test_planes_do_not_depend_on_tensor_parallelism(ranks: int) -> None:
    whole = draw_planes(shape_of(num_kv_heads=8))
    mine = 8 // ranks
    for rank in range(ranks):
        part = draw_planes(shape_of(num_kv_heads=mine, first_kv_head=rank * mine))
        assert torch.equal(part, whole[rank * mine : (rank + 1) * mine])


def test_planes_repeat() -> None:
    first = draw_planes(shape_of())
    torch.manual_seed(99)
    assert torch.equal(draw_planes(shape_of()), first)


def test_bytes_per_token() -> None:
    assert index_of(shape_of()).bytes_per_token() == 3 * BITS / 8
