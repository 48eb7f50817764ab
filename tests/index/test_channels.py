"""Channel codes: the twin agrees, weak matches are found where sign hashes miss them."""

from __future__ import annotations

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.index.channels import (
    Channels,
    ChannelsIndex,
    channel_codes_reference,
    channel_logits_reference,
)
from kvplug.index.shares import share_scores_reference
from kvplug.index.simhash import SimHashIndex
from kvplug.probe.base import Probes
from kvplug.stage import Layer, LayerShape
from tests.caches import KeyCache, fill
from tests.made_up import layer_shape
from tests.steps import Far, step_of

NAN = float("nan")


def shape_of(**changed: float) -> LayerShape:
    geometry = {"page": 4, "head_dim": 48, "window": 16, "local": 24, "num_pages": 60}
    return layer_shape(**{**geometry, **changed})


def index_of(bits: int, shape: LayerShape) -> ChannelsIndex:
    return ChannelsIndex(Channels(bits), Layer(shape, {}, KeyCache(shape).reader()))


def keys_of(shape: LayerShape, pages: int) -> torch.Tensor:
    """``[n * P, Hk, D]`` keys of a few strong channels and many weak ones, away from 0."""
    strength = torch.rand(shape.num_kv_heads, shape.head_dim) ** 3 + 0.05
    return torch.randn(pages * shape.page, *strength.shape) * strength + 1


def scores_of(
    index: ChannelsIndex | SimHashIndex, probes: torch.Tensor, table: torch.Tensor, begin: int = 0
) -> torch.Tensor:
    """``[Hk, N]`` for one window over the pages of the table from ``begin`` on."""
    step = step_of([Far(0, begin, table.shape[1])], table)
    heads, count = probes.shape[:2]
    scores = torch.full((1, heads, table.shape[1] - begin), NAN)
    index.score(Probes(probes[None], torch.tensor([count], dtype=torch.int32)), step, scores)
    return scores[0]


def expected_scores(
    index: ChannelsIndex, keys: torch.Tensor, probes: torch.Tensor, begin: int = 0
) -> torch.Tensor:
    page = index.shape.page
    first = keys[: index.first_pages * page]
    chosen, deviation, codes = channel_codes_reference(first, keys, index.channels)
    logits = channel_logits_reference(
        chosen, deviation, codes[begin * page :], probes, page, index.shape.scale
    )
    return share_scores_reference(logits)


@pytest.mark.parametrize("bits", [64, 128])
@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize(
    ("dim", "page", "pages"), [(48, 4, 40), (7, 3, 20), (128, 32, 9), (80, 1, 60)]
)
def test_twin(dim: int, page: int, pages: int, probes: int, bits: int) -> None:
    shape = shape_of(head_dim=dim, page=page)
    index = index_of(bits, shape)
    assert index.channels == min(bits // 2, dim)
    keys, vectors = keys_of(shape, pages), torch.randn(3, probes, dim)
    table = torch.randperm(60)[:pages].to(torch.int32)[None]
    fill(index, keys, table[0])
    found = scores_of(index, vectors, table, begin=2)
    # Weights are whole numbers; logits and shares round a few times.
    assert (found - expected_scores(index, keys, vectors, begin=2)).abs().max() < 1e-4


def test_channels_are_those_of_the_first_tokens() -> None:
    """What comes later, in other channels, changes none of it."""
    shape = shape_of()
    index = index_of(64, shape)
    keys = keys_of(shape, 40)
    keys[index.first_pages * shape.page :, :, :5] *= 100
    fill(index, keys, torch.arange(40))
    chosen, deviation, _ = channel_codes_reference(keys[:16], keys[:16], 32)
    assert index.first_pages == 4  # the window, for the local region is longer
    assert torch.equal(index._chosen[0].long(), chosen)
    assert torch.allclose(index._scales[0, :, 1], deviation, rtol=1e-5)
    assert (index._chosen[1:] == 0).all()


def test_two_contexts_have_channels_of_their_own() -> None:
    shape = shape_of()
    both = index_of(128, shape)
    tables = torch.stack([torch.arange(20), torch.arange(39, 19, -1)]).to(torch.int32)
    keys, vectors = [keys_of(shape, 20), keys_of(shape, 20) * 3 - 5], torch.randn(2, 3, 2, 48)
    for table, mine in zip(tables, keys, strict=True):
        fill(both, mine, table)
    scores = torch.full((2, 3, 18), NAN)
    step = step_of([Far(1, 2, 20), Far(0, 2, 20)], tables)
    both.score(Probes(vectors, torch.tensor([2, 1], dtype=torch.int32)), step, scores)
    for w, (request, count) in enumerate([(1, 2), (0, 1)]):
        expected = expected_scores(both, keys[request], vectors[w, :, :count].contiguous(), 2)
        assert (scores[w] - expected).abs().max() < 1e-4


def weak_matches(shape: LayerShape, cosine: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that differ in 24 channels; 12 tokens, and for each a query that has this cosine to it.

    The rest of a query lies where keys hardly differ, so exact attention is not misled.
    """
    strength = torch.ones(shape.head_dim)
    strength[24:] = 0.05
    keys = torch.randn(shape.num_pages * shape.page, 1, shape.head_dim) * strength
    tokens = torch.randperm(len(keys))[:12]
    mine = keys[tokens, 0] / keys[tokens, 0].norm(dim=1, keepdim=True)
    rest = torch.randn(12, shape.head_dim) * (strength < 1)
    rest -= (rest * mine).sum(1, keepdim=True) * mine
    rest /= rest.norm(dim=1, keepdim=True)
    return keys, torch.cat(
        [tokens[:, None].float(), cosine * mine + (1 - cosine**2) ** 0.5 * rest], 1
    )


@pytest.mark.parametrize("bits", [64, 128])
def test_a_weak_match_is_found_where_sign_hashes_miss_it(bits: int) -> None:
    """Learned queries have a cosine of about 0.5 to the keys that win their attention."""
    geometry = {"num_pages": 400, "num_kv_heads": 1, "page": 16, "head_dim": 128, "window": 128}
    shape = shape_of(**geometry, local=128)
    keys, queries = weak_matches(shape, 0.4)
    table = torch.arange(400, dtype=torch.int32)[None]
    ranks: dict[str, list[int]] = {}
    signs = SimHashIndex(Layer(shape, {}, KeyCache(shape).reader()))
    indexes: dict[str, ChannelsIndex | SimHashIndex] = {
        "channels": index_of(bits, shape), "simhash": signs,
    }  # fmt: skip
    for name, index in indexes.items():
        fill(index, keys, table[0])
        for row in queries:
            scores = scores_of(index, row[1:].view(1, 1, -1).contiguous(), table)[0]
            better = int((scores > scores[int(row[0]) // 16]).sum())
            ranks.setdefault(name, []).append(better)
    found = {name: sum(rank < 16 for rank in all_ranks) for name, all_ranks in ranks.items()}
    assert found["channels"] >= 11
    assert found["simhash"] <= found["channels"] - 5


def test_a_probe_that_is_no_number_ranks_nothing() -> None:
    shape = shape_of()
    index = index_of(64, shape)
    fill(index, keys_of(shape, 20), torch.arange(20))
    vectors = torch.randn(3, 1, 48)
    vectors[1] = NAN
    scores = scores_of(index, vectors, torch.arange(20, dtype=torch.int32)[None])
    assert scores[1].isnan().all()
    assert scores[[0, 2]].isfinite().all()


def test_a_probe_of_zeros_ranks_no_page_above_another() -> None:
    shape = shape_of()
    index = index_of(64, shape)
    fill(index, keys_of(shape, 20), torch.arange(20))
    scores = scores_of(index, torch.zeros(3, 1, 48), torch.arange(20, dtype=torch.int32)[None])
    assert (scores == scores[0, 0]).all()


@pytest.mark.parametrize(("bits", "bytes_per_token"), [(64, 8), (128, 16)])
def test_size(bits: int, bytes_per_token: int) -> None:
    """Per KV head; a 64th and a 32nd of keys and values of 128 dimensions in bfloat16."""
    shape = shape_of(num_pages=4000, num_kv_heads=1)
    assert index_of(bits, shape).bytes_per_token() == pytest.approx(bytes_per_token, rel=0.01)


def test_bits_that_do_not_exist_are_refused() -> None:
    with pytest.raises(KvplugError, match="64 or 128"):
        Channels(32)
