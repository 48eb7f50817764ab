"""Hash buckets: the twin agrees to the bit, an equal key always hits, overflow keeps the newest."""

from __future__ import annotations

import math

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.index.buckets import BucketIndex, Buckets, bucket_scores_reference
from kvplug.index.planes import BITS
from kvplug.pages import PageGeometry
from kvplug.probe.base import Probes
from kvplug.select.top_pages import TopPages
from kvplug.stage import Layer
from tests.caches import KeyCache, fill
from tests.made_up import Piece, layer_shape
from tests.steps import Far, counts_of, step_of
from tests.streams import watched

NAN = float("nan")
PAGE, DIM, HEADS, KV_HEADS, PAGES = 5, 24, 6, 3, 40
GEOMETRY = PageGeometry(PAGE, 4 * PAGE, 0, PAGE, 2, 0, 2)
TABLE = torch.arange(PAGES, dtype=torch.int32)[None]
ROUNDS = [(4, 16), (8, 8), (8, 3), (1, 64), (64, 1), (5, 12), (7, 2), (33, 1), (2, 32), (1, 1)]


def index_of(bits: int = 4, rounds: int = 16, **changed: int) -> BucketIndex:
    shape = {"page": PAGE, "head_dim": DIM, "layer": 2, "seed": 7, "window": 4 * PAGE} | changed
    made = layer_shape(**shape)
    return Buckets(bits, rounds).for_layer(Layer(made, {}, KeyCache(made).reader()))


def write(
    index: BucketIndex, keys: torch.Tensor, queries: torch.Tensor, table: torch.Tensor
) -> None:
    """One prompt of ``keys [T, Hk, D]`` and ``queries [T, H, D]``, centred by its own means."""
    page = index.shape.page
    geometry = GEOMETRY._replace(page=page, window=4 * page)
    watched([index.centre], geometry, [Piece(0, 0, len(keys), True)], table, [queries], [keys])
    fill(index, keys, table[0, : len(keys) // page])


def set_centre(index: BucketIndex, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the request that begins on ``page`` means of whole numbers; ``[Hk, D], [H, D]``."""
    centre = index.centre
    for means in (centre.keys, centre.queries):
        means[page] = torch.randint(-2, 3, means[page].shape).float()
    return centre.keys[page], centre.queries[page]


def scores_of(
    index: BucketIndex, probes: torch.Tensor, table: torch.Tensor = TABLE
) -> torch.Tensor:
    """``[Hk, N]`` for one window over all pages of the table; ``probes [Hk, R, D]``."""
    step = step_of([Far(0, 0, table.shape[1])], table)
    heads, count = probes.shape[:2]
    scores = torch.full((1, heads, table.shape[1]), NAN)
    index.score(Probes(probes[None], torch.tensor([count], dtype=torch.int32)), step, scores)
    return scores[0]


def far_from_ties(vectors: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """``[n, Hk, D]``, those redrawn whose projections float32 might round to another sign."""
    while True:
        sums = torch.einsum("thd,hdb->thb", vectors.double(), planes.double())
        close = (sums.abs() < 1e-3).any(-1)
        if not close.any():
            return vectors
        vectors = torch.where(close[..., None], torch.randn_like(vectors), vectors)


@pytest.mark.parametrize(("bits", "rounds"), ROUNDS)
@pytest.mark.parametrize("probes", [1, 2, 7])
def test_twin(probes: int, bits: int, rounds: int) -> None:
    """Keys less their request's mean key, probes less the mean of their own query head."""
    index = index_of(bits, rounds)
    table = torch.randperm(PAGES).to(torch.int32)[None]
    mean_key, mean_query = set_centre(index, int(table[0, 0]))
    keys = far_from_ties(torch.randn(PAGES * PAGE, KV_HEADS, DIM), index.planes)
    vectors = far_from_ties(torch.randn(probes, KV_HEADS, DIM), index.planes)
    # Multiples of 2**-12 survive adding and subtracting a small whole number.
    keys, vectors = (torch.round(v * 4096) / 4096 for v in (keys, vectors))
    group = mean_query.view(KV_HEADS, 2, DIM)[:, torch.arange(probes) % 2]
    fill(index, keys + mean_key, table[0])
    found = scores_of(index, vectors.transpose(0, 1) + group, table)
    planes = index.planes[..., : bits * rounds]
    expected = bucket_scores_reference(keys, vectors.transpose(0, 1), planes, bits, PAGE)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("bits", "rounds"), ROUNDS)
def test_twin_where_projections_are_zero(bits: int, rounds: int) -> None:
    """Small integers make every sum exact, and many of them 0: not above the plane."""
    index = index_of(bits, rounds)
    index.planes.copy_(torch.randint(-1, 2, index.planes.shape))
    keys = torch.randint(-1, 2, (200, KV_HEADS, DIM)).float()
    probes = torch.randint(-1, 2, (KV_HEADS, 4, DIM)).float()
    fill(index, keys, TABLE[0])
    expected = bucket_scores_reference(keys, probes, index.planes[..., : bits * rounds], bits, PAGE)
    assert torch.equal(scores_of(index, probes), expected)


def test_windows_are_scored_apart() -> None:
    """Each has its own request, its centre, far range and number of probes."""
    index = index_of()
    table = torch.stack([torch.randperm(PAGES), torch.randperm(PAGES)]).to(torch.int32)
    # Both requests lie on all pages; what differs is the page of the first token.
    means = [set_centre(index, int(row[0])) for row in table]
    keys = torch.randint(-3, 4, (200, KV_HEADS, DIM)).float()
    index.planes.copy_(torch.randint(-1, 2, index.planes.shape))
    index.centre.keys.zero_()
    fill(index, keys, table[0])
    far = [Far(1, 2, 30), Far(0, 0, 0, sparse=False), Far(0, 5, 6), Far(1, 0, 40)]
    counts = torch.tensor([3, 1, 2], dtype=torch.int32)
    vectors = torch.randint(-3, 4, (3, KV_HEADS, 3, DIM)).float()
    for w, count in enumerate(counts):
        vectors[w, :, count:] = NAN
    scores = torch.full((3, KV_HEADS, PAGES), -5.0)
    index.score(Probes(vectors, counts), step_of(far, table), scores)
    order = table[0].argsort()
    for w, window in enumerate((far[0], far[2], far[3])):
        logical = order[table[window.request, window.begin : window.end].long()]
        paged = keys.unflatten(0, (PAGES, PAGE))[logical].flatten(0, 1)
        group = means[window.request][1].view(KV_HEADS, 2, DIM)[:, torch.arange(3) % 2]
        centred = (vectors[w] - group)[:, : counts[w]]
        expected = bucket_scores_reference(paged, centred, index.planes, 4, PAGE)
        assert torch.equal(scores[w, :, : len(logical)], expected)
        assert (scores[w, :, len(logical) :] == -5).all()


@pytest.mark.parametrize(("bits", "rounds"), ROUNDS)
def test_a_key_equal_to_the_centred_query_is_hit_in_every_round(bits: int, rounds: int) -> None:
    """Clouds far from the origin, each its own way; uncentred, they would not meet."""
    index = index_of(bits, rounds)
    queries = torch.randint(-64, 65, (200, HEADS, DIM)) / 16
    keys = queries[:, ::2] + torch.randint(-64, 65, (KV_HEADS, DIM)).float() * 4
    write(index, keys, queries, TABLE)
    for token in (0, 20, 99, 199):
        probes = queries[token, ::2][:, None].contiguous()
        assert (scores_of(index, probes)[:, token // PAGE] == rounds).all()
    if bits * rounds >= 8:
        index.centre.queries.zero_()
        assert (scores_of(index, probes)[:, 199 // PAGE] < rounds).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_opposite_key_is_never_hit(dtype: torch.dtype) -> None:
    index = index_of(page=1)
    keys = torch.randn(PAGES, KV_HEADS, DIM).to(dtype).float()
    fill(index, keys, TABLE[0])
    assert (scores_of(index, -keys[13][:, None])[:, 13] == 0).all()


@pytest.mark.parametrize("rounds", [1, 3])
def test_an_overflowing_bucket_keeps_the_newest(rounds: int) -> None:
    """Every third page is hit as often as can be: the newest of them are chosen, as in HAX."""
    index = index_of(8, rounds)
    probe = torch.randn(KV_HEADS, 1, DIM)
    keys = -probe[:, 0].repeat(PAGES * PAGE, 1, 1)
    hit = list(range(1, PAGES, 3))
    keys[[page * PAGE + page % PAGE for page in hit]] = probe[:, 0]
    fill(index, keys, TABLE[0])
    scores = scores_of(index, probe)
    assert scores[0].nonzero().flatten().tolist() == hit
    step = step_of([Far(0, 0, PAGES, 4)], TABLE)
    selected = torch.full((1, KV_HEADS, 4), -9, dtype=torch.int32)
    TopPages().select(scores[None], step, counts_of(step, KV_HEADS), selected)
    assert selected[0].tolist() == [hit[-4:]] * KV_HEADS


@pytest.mark.parametrize(("bits", "rounds"), [(4, 16), (8, 8), (1, 64)])
def test_collision_probability(bits: int, rounds: int) -> None:
    """Two vectors share a bucket with probability (1 - angle / pi) ** bits (Charikar 2002).

    A page of one token, 64 layers with planes of their own, 3 heads and ``rounds`` rounds: the
    rounds of a layer and head are independent, so the share of hits deviates from its
    expectation p by sqrt(p (1 - p) / n), and by 4 times that with probability 6e-5.
    """
    cosines = torch.tensor([0.95, 0.7, 0.3, 0.0, -0.5])
    probe = torch.nn.functional.normalize(torch.randn(KV_HEADS, DIM), dim=-1)
    noise = torch.randn(len(cosines), KV_HEADS, DIM)
    noise -= (noise * probe).sum(-1, keepdim=True) * probe
    across = torch.nn.functional.normalize(noise, dim=-1)
    sines = (1 - cosines**2).sqrt()
    keys = cosines[:, None, None] * probe + sines[:, None, None] * across
    hits = torch.zeros(len(cosines))
    for layer in range(64):
        index = index_of(bits, rounds, page=1, layer=layer, num_pages=5)
        fill(index, keys, TABLE[0, :5])
        hits += scores_of(index, probe[:, None], TABLE[:, :5]).sum(0)
    trials = 64 * KV_HEADS * rounds
    for cosine, found in zip(cosines.tolist(), (hits / trials).tolist(), strict=True):
        expected = (1 - math.acos(cosine) / math.pi) ** bits
        assert abs(found - expected) <= 4 * math.sqrt(expected * (1 - expected) / trials)


def test_a_prefix_hit_is_hashed_by_the_mean_on_the_shared_page() -> None:
    """A request that goes on behind a shared first page hashes as the one that began it."""
    keys, queries = torch.randn(60, KV_HEADS, DIM) + 1, torch.randn(60, HEADS, DIM)
    index, cold = index_of(), index_of()
    write(index, keys[:40], queries[:40], TABLE)
    table = torch.cat([TABLE[:, :4], TABLE[:, 20:30]], 1)  # one window is shared
    fill(index, keys, table[0, :12])
    write(cold, keys, queries, table)
    assert torch.equal(index.words[20:28], cold.words[20:28])
    assert (index.words[20:28] != 0).all()


def test_no_number_is_no_crash() -> None:
    index = index_of()
    keys = torch.randn(200, KV_HEADS, DIM)
    keys[3], keys[70], keys[71] = NAN, math.inf, -math.inf
    queries = torch.full((200, HEADS, DIM), NAN)
    write(index, keys, queries, TABLE)
    scores = scores_of(index, torch.full((KV_HEADS, 2, DIM), NAN))
    assert ((scores >= 0) & (scores <= 16)).all()


@pytest.mark.parametrize("other", [{"seed": 8}, {"layer": 3}, {"first_kv_head": 3}], ids=str)
def test_planes_follow_from_seed_layer_and_head(other: dict[str, int]) -> None:
    assert torch.equal(index_of().planes, index_of(8, 2).planes)
    assert not (index_of(**other).planes == index_of().planes).any()


@pytest.mark.parametrize(("bits", "rounds"), [(0, 4), (4, 0), (-1, -1), (8, 9), (65, 1), (5, 13)])
def test_what_does_not_fit_a_word_is_refused(bits: int, rounds: int) -> None:
    with pytest.raises(KvplugError, match=rf"bits \* rounds <= 64, not {bits}, {rounds}\.$"):
        Buckets(bits, rounds)


def test_bytes_per_token() -> None:
    assert index_of().bytes_per_token() == KV_HEADS * BITS / 8
