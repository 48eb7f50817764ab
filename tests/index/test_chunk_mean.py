"""Means of pages and of chunks: whose they are, when they are made, and what they rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.index import base, chunk_mean
from kvplug.index.chunk_mean import ChunkMean, ChunkMeanIndex, chunk_mean_scores_reference
from kvplug.probe.base import Probes
from kvplug.stage import Layer
from tests.caches import KeyCache
from tests.cases import PolicyCase
from tests.made_up import Piece, World, layer_shape
from tests.steps import Far, step_of

PAGE, DIM, HEADS, SCALE = 4, 8, 2, 0.25
ROUNDING = 2.0**-8
"""bfloat16 keeps 8 bits: the largest error of a rounded number, as a part of it."""


class Made:
    """An index over a cache of its own, whose pages a test writes and seals.

    Args:
        options: The stage.
        pages: Physical pages.
    """

    def __init__(
        self, options: ChunkMean, pages: int, page: int = PAGE, dim: int = DIM, heads: int = HEADS
    ) -> None:
        shape = layer_shape(
            num_pages=pages, num_kv_heads=heads, page=page, head_dim=dim, scale=SCALE
        )
        self.cache, self.page = KeyCache(shape), page
        self.index = options.for_layer(Layer(shape, {}, self.cache.reader()))
        assert isinstance(self.index, ChunkMeanIndex)

    def write(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Keys ``[T, Hk, D]`` enter the cache."""
        self.cache.write(keys, slots)

    def write_pages(self, keys: torch.Tensor, pages: torch.Tensor) -> None:
        """Whole pages of keys, in order."""
        slots = pages.long()[:, None] * self.page + torch.arange(self.page)
        self.write(keys, slots.flatten())

    def watch(self, far: Sequence[Far], table: torch.Tensor) -> None:
        self.cache.seal(step_of(far, table), self.index)

    def scores(self, probes: torch.Tensor, far: Far, table: torch.Tensor) -> torch.Tensor:
        """``[Hk, N]`` of one window, whose far pages are sealed."""
        self.watch([far], table)
        scores = torch.full((1, len(probes), far.end - far.begin), math.nan)
        counts = torch.tensor([probes.shape[1]], dtype=torch.int32)
        self.index.score(Probes(probes[None], counts), step_of([far], table), scores)
        return scores[0]


def in_order(pages: int) -> torch.Tensor:
    return torch.arange(pages, dtype=torch.int32)[None]


@pytest.mark.parametrize("reduce", ["max", "sum"])
@pytest.mark.parametrize("heads", ["each", "all"])
@pytest.mark.parametrize(
    ("pages", "spread", "selected"),
    [(1, 1.0, 3), (3, 1.0, 4), (3, 2.5, 2), (8, 1.0, 1), (5, 9e9, 2)],
)
def test_twin(pages: int, spread: float, selected: int, heads: str, reduce: str) -> None:
    options = ChunkMean(pages=pages, spread=spread, heads=heads, reduce=reduce)
    for page, dim, probes, far in (
        (4, 8, 1, range(2, 39)),
        (5, 19, 3, range(0, 33)),
        (1, 33, 2, range(7, 8)),
    ):
        made = Made(options, 50, page, dim)
        table = torch.randperm(50).to(torch.int32)[None, :40]
        keys, vectors = torch.randn(40 * page, HEADS, dim), torch.randn(HEADS, probes, dim)
        made.write_pages(keys, table[0])
        window = Far(0, far.start, far.stop, selected)
        found = made.scores(vectors, window, table)
        wanted = math.ceil(min(spread * selected / pages, 1000))
        expected = chunk_mean_scores_reference(keys, vectors, page, far, wanted, options, SCALE)
        # The means are rounded alike unless they lie on an edge: float32 sums differ in order.
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * SCALE * 3)
        assert (found - expected)[expected.isfinite()].abs().median() < 1e-5
        hidden = found.isneginf().sum(1)
        chunks = max(far.stop // pages - -(-far.start // pages), 0)
        assert (hidden == max(chunks - wanted, 0) * pages).all()


@pytest.mark.parametrize(("dim", "page"), [(DIM, 3), (64, 32), (80, 16), (128, 64)])
def test_both_builds_give_the_same_bits(dim: int, page: int) -> None:
    """The amount of work decides between them, so a replayed step may take the other one."""
    found = []
    for build in ("_one_thread", "_all_threads"):
        with pytest.MonkeyPatch.context() as patch:
            for kernel in ("_write_page_means", "_write_chunk_means", "_score_pages"):
                compiled = getattr(chunk_mean, kernel)
                only = getattr(compiled, build)
                patch.setattr(chunk_mean, kernel, lambda _, *args, only=only: only(*args))
            torch.manual_seed(0)
            made = Made(ChunkMean(pages=3, spread=1.0, reduce="max"), 60, page, dim)
            made.write_pages(torch.randn(60 * page, HEADS, dim), torch.arange(60))
            window = Far(0, 0, 60, selected=12)
            found.append(made.scores(torch.randn(HEADS, 3, dim), window, in_order(60)))
            found.append(made.index.chunks.view(torch.int16))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_windows_are_scored_apart() -> None:
    options = ChunkMean(pages=2, spread=1.0)
    made = Made(options, 48)
    keys = torch.randn(48 * PAGE, HEADS, DIM)
    made.write_pages(keys, torch.arange(48))
    table = torch.randperm(48).to(torch.int32).view(2, 24)
    far = [Far(1, 2, 21, 3), Far(0, 0, 24, sparse=False), Far(0, 5, 6), Far(1, 0, 23, 2)]
    made.watch([Far(0, 0, 24), Far(1, 0, 24)], table)
    counts = torch.tensor([3, 1, 2], dtype=torch.int32)
    vectors = torch.randn(3, HEADS, 3, DIM)
    for w, count in enumerate(counts):
        vectors[w, :, count:] = 1e9
    scores = torch.full((3, HEADS, 24), -5e5)
    made.index.score(Probes(vectors, counts), step_of(far, table), scores)
    for w, window in enumerate((far[0], far[2], far[3])):
        mine = keys.unflatten(0, (48, PAGE))[table[window.request].long()].flatten(0, 1)
        expected = chunk_mean_scores_reference(
            mine, vectors[w, :, : counts[w]], PAGE, range(window.begin, window.end),
            math.ceil(window.selected / 2), options, SCALE,
        )  # fmt: skip
        filled = window.end - window.begin
        torch.testing.assert_close(scores[w, :, :filled], expected, rtol=0, atol=ROUNDING)
        assert (scores[w, :, filled:] == -5e5).all()


def test_a_mean_is_the_mean_of_its_keys() -> None:
    """To the nearest bfloat16; a chunk's is that of its pages."""
    made = Made(ChunkMean(pages=3), 12, page=7)
    keys = torch.randn(12 * 7, HEADS, DIM)
    made.write_pages(keys, torch.arange(12))
    made.watch([Far(0, 2, 11)], in_order(12))
    means = keys.double().unflatten(0, (12, 7)).mean(1)
    found = made.index.means[2:11].double()
    assert ((found - means[2:11]).abs() <= means[2:11].abs() * ROUNDING + 1e-6).all()
    for last in (5, 8):
        inner = made.index.means[last - 2 : last + 1].double().mean(0)
        chunk = made.index.chunks[last].double()
        assert ((chunk - inner).abs() <= inner.abs() * ROUNDING + 1e-6).all()
    # Chunk 0 begins at the sinks, and chunk 3 is not complete.
    written = made.index.chunks.float().abs().sum((1, 2)).nonzero().flatten().tolist()
    assert written == [5, 8]


@pytest.mark.parametrize("per_read", [1, 2, 5, 100])
def test_memory_is_bounded_whatever_a_step_seals(
    per_read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PAGES_PER_READ", per_read)
    keys = torch.randn(20 * PAGE, HEADS, DIM)
    made = Made(ChunkMean(pages=3), 20)
    made.write_pages(keys, torch.arange(20))
    made.watch([Far(0, 1, 20)], in_order(20))
    held = made.cache.workspace.take("reader.keys", (0,), torch.float32).untyped_storage().nbytes()
    assert held <= 1.5 * per_read * HEADS * PAGE * DIM * 4
    expected = keys.unflatten(0, (20, PAGE)).mean(1)[1:]
    torch.testing.assert_close(made.index.means[1:].float(), expected, rtol=ROUNDING, atol=1e-6)


def test_only_the_best_chunks_are_looked_into() -> None:
    """12 pages in chunks of 2; the query's own direction lies at page 7, a weaker copy at 2."""
    made = Made(ChunkMean(pages=2, spread=1.0), 12)
    keys = torch.zeros(12 * PAGE, HEADS, DIM)
    keys[7 * PAGE : 8 * PAGE, :, 0] = 4.0
    keys[2 * PAGE : 3 * PAGE, :, 0] = 1.0
    made.write_pages(keys, torch.arange(12))
    probe = torch.zeros(HEADS, 1, DIM)
    probe[:, :, 0] = 2.0
    best = made.scores(probe, Far(0, 1, 12, selected=2), in_order(12))
    # Page 1 belongs to a chunk that begins at a sink, so it is always scored; pages 6 and 7 are
    # the best chunk: scale * 2 * 4 = 2.
    expected = torch.full((11,), -math.inf)
    expected[0], expected[5], expected[6] = 0.0, 0.0, 2.0
    assert torch.equal(best, expected.expand(HEADS, -1))
    two = made.scores(probe, Far(0, 1, 12, selected=3), in_order(12))
    expected[1], expected[2] = 0.5, 0.0
    assert torch.equal(two, expected.expand(HEADS, -1))


def test_equal_chunks_are_looked_into_from_the_newest() -> None:
    made = Made(ChunkMean(pages=2, spread=1.0), 11)
    made.write_pages(torch.ones(11 * PAGE, HEADS, DIM), torch.arange(11))
    found = made.scores(torch.ones(HEADS, 1, DIM), Far(0, 0, 11, selected=4), in_order(11))
    assert found[0].isfinite().tolist() == [False] * 6 + [True] * 5


def test_heads_that_agree_score_alike_and_may_not_when_apart() -> None:
    keys, probes = torch.randn(24 * PAGE, HEADS, DIM), torch.randn(HEADS, 2, DIM)
    found = {}
    for heads in ("each", "all"):
        made = Made(ChunkMean(pages=3, spread=1.0, heads=heads), 24)
        made.write_pages(keys, torch.arange(24))
        found[heads] = made.scores(probes, Far(0, 0, 24, selected=6), in_order(24))
    assert torch.equal(found["all"][0], found["all"][1])
    assert not torch.equal(found["each"][0].isfinite(), found["each"][1].isfinite())


@pytest.mark.parametrize("pages", [1, 2, 7])
def test_two_levels_are_one_where_all_chunks_are_looked_into(pages: int) -> None:
    """To the bit: against an index whose chunks are never complete."""
    keys, probes = torch.randn(30 * PAGE, HEADS, DIM), torch.randn(HEADS, 3, DIM)
    found = []
    for options in (ChunkMean(pages=pages, spread=30.0), ChunkMean(pages=1000)):
        made = Made(options, 30)
        made.write_pages(keys, torch.arange(30))
        found.append(made.scores(probes, Far(0, 1, 29, selected=1), in_order(30)))
    assert torch.equal(*found)
    assert found[0].isfinite().all()


def test_a_page_mean_under_counts_its_page() -> None:
    """Jensen: ``|b| exp(q . mean) <= sum of exp(q . k)``, equal where the keys are.

    Small integers: means of 4 are exact in bfloat16.
    """
    made = Made(ChunkMean(), 40)
    keys = torch.randint(-3, 4, (40 * PAGE, HEADS, DIM)).float()
    keys[:PAGE] = keys[0]
    made.write_pages(keys, torch.arange(40))
    probes = torch.randn(HEADS, 1, DIM)
    scores = made.scores(probes, Far(0, 0, 40, selected=40), in_order(40)).double()
    logits = SCALE * torch.einsum("thd,hd->ht", keys.double(), probes[:, 0].double())
    mass = logits.exp().unflatten(1, (40, PAGE)).sum(-1)
    promised = PAGE * scores.exp()
    assert (promised <= mass * (1 + 1e-6)).all()
    torch.testing.assert_close(promised[:, 0], mass[:, 0], rtol=1e-6, atol=0)
    assert (promised[:, 1:] < 0.9 * mass[:, 1:]).any()


def test_rejected_drafts_leave_nothing_behind() -> None:
    """Also where their own windows, far ahead, sealed the pages that are written anew."""
    made, table = Made(ChunkMean(pages=2), 6), in_order(6)
    keys = torch.randn(6 * PAGE, HEADS, DIM)
    made.write_pages(keys, torch.arange(6))
    made.watch([Far(0, 0, 6)], table)
    better = torch.randn(PAGE * 3 + 1, HEADS, DIM)
    for token in range(len(better)):
        slot = 3 * PAGE - 1 + token
        made.write(better[token : token + 1], torch.tensor([slot]))
        made.watch([Far(0, 0, (slot + 1) // PAGE)], table)
    keys[3 * PAGE - 1 :] = better
    fresh = Made(ChunkMean(pages=2), 6)
    fresh.write_pages(keys, torch.arange(6))
    fresh.watch([Far(0, 0, 6)], table)
    assert torch.equal(made.index.means, fresh.index.means)
    assert torch.equal(made.index.chunks, fresh.index.chunks)


def test_requests_that_part_inside_a_chunk_have_a_mean_each() -> None:
    """Pages 0 to 3 are shared; chunk 1 is pages 3, 4, 5 of the one and 3, 6, 7 of the other."""
    made = Made(ChunkMean(pages=3), 8)
    made.write_pages(torch.randn(8 * PAGE, HEADS, DIM), torch.arange(8))
    table = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7]], dtype=torch.int32)
    made.watch([Far(0, 0, 6)], table)
    made.watch([Far(1, 0, 6)], table)
    for request in range(2):
        pages = table[request, 3:].long()
        expected = made.index.means[pages].float().mean(0)
        chunk = made.index.chunks[pages[-1]].float()
        torch.testing.assert_close(chunk, expected, rtol=ROUNDING, atol=1e-6)


def remembered(made: World, request: int, length: int) -> torch.Tensor:
    """``[pages, bits]`` of what is kept of a request's far pages, in their order."""
    assert made.layer is not None
    assert isinstance(made.layer.index, ChunkMeanIndex)
    pages = made.pages_of[request][2 : (length - 20) // 8]
    state = made.layer.index
    chunks = state.chunks.view(torch.int16)[pages].flatten(1)
    # Entries of pages that do not end a chunk hold whatever was there.
    ends = torch.tensor([n % 3 == 2 and n >= 5 for n in range(2, 2 + len(pages))])
    return torch.cat([state.means.view(torch.int16)[pages].flatten(1), chunks * ends[:, None]], 1)


def test_the_same_bits_in_any_chunks_batch_pages_or_replay() -> None:
    case = PolicyCase("hcam", {"pages": 3, "spread": 1.0})
    options = {"sink": 10, "local": 20, "budget": 46, "window": 16, "dense_below": 100}

    def world(shuffle: int = 0) -> World:
        return World(case, options, 8, shuffle=shuffle)

    whole = world()
    whole.run([Piece(1, 0, 500, True)], cached=False)
    decoded = world(1)
    decoded.prefill(1, 400)
    for position in range(400, 500):
        decoded.run([Piece(1, position, 1, False)], cached=False)
    replayed = world(2)
    replayed.prefill(1, 400)
    replayed.run([Piece(1, 400, 100, False)], cached=False)
    batched = world(3)
    for start in range(0, 500, 48):
        mine = Piece(1, start, min(48, 500 - start), True)
        batched.run([Piece(2, start, 16, True), mine, Piece(3, start, 32, True)], cached=False)
    # The prompt's last window begins at 496; decoded tokens seal further pages behind it.
    expected = remembered(whole, 1, 497)
    assert expected.any(1).all()
    for other in (decoded, replayed, batched):
        assert torch.equal(remembered(other, 1, 497), expected)
    assert torch.equal(remembered(decoded, 1, 500), remembered(replayed, 1, 500))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_keys_that_are_no_numbers(value: float) -> None:
    """Their chunk ranks last; the rest is scored as ever."""
    made = Made(ChunkMean(pages=2, spread=1.0), 12)
    keys = torch.ones(12 * PAGE, HEADS, DIM)
    keys[4 * PAGE + 1, :, 3] = value
    made.write_pages(keys, torch.arange(12))
    found = made.scores(torch.ones(HEADS, 1, DIM), Far(0, 0, 12, selected=10), in_order(12))
    usual = SCALE * DIM
    for n in set(range(12)) - {4, 5}:
        assert (found[:, n] == usual).all()
    assert found[:, 4:6].isneginf().all()


def test_probes_that_are_no_numbers() -> None:
    made = Made(ChunkMean(pages=2, spread=1.0), 12)
    made.write_pages(torch.randn(12 * PAGE, HEADS, DIM), torch.arange(12))
    probes = torch.full((HEADS, 2, DIM), math.nan)
    found = made.scores(probes, Far(0, 0, 12, selected=4), in_order(12))
    assert not found.isfinite().any()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pages": 0}, "pages >= 1"),
        ({"spread": 0.99}, "spread >= 1"),
        ({"spread": math.nan}, "spread >= 1"),
        ({"heads": "some"}, "heads to be 'each' or 'all', not 'some'"),
        ({"reduce": "mean"}, "reduce to be 'sum' or 'max', not 'mean'"),
    ],
)
def test_bad_options(options: dict[str, object], told: str) -> None:
    with pytest.raises(KvplugError, match=told):
        ChunkMean(**options)  # type: ignore[arg-type]


def test_bytes_per_token() -> None:
    """Two bfloat16 vectors a page and head."""
    index = Made(ChunkMean(), 12).index
    assert index.bytes_per_token() == HEADS * 2 * DIM * 2 / PAGE
