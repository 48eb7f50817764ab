"""Local mass: known in closed form, equal to the twin, and a function of the request alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from kvplug.index import local_mass
from kvplug.index.local_mass import EVERY, LocalMass, local_mass_reference
from tests.cases import PolicyCase
from tests.made_up import HEAD_DIM, MAX_CONTEXT, Piece, World, layer_of

PAGE, WINDOW, LOCAL, SINKS = 8, 16, 20, 2
HEADS, GROUP = 3, 2
SCALE = 0.25
NAN, INF = float("nan"), float("inf")
EPS = torch.finfo(torch.float32).eps


@dataclass
class Made(World):
    """A world whose keys and queries a test may set: ``[MAX_CONTEXT, heads, D]``."""

    made_keys: dict[int, torch.Tensor] = field(default_factory=dict)
    made_queries: dict[int, torch.Tensor] = field(default_factory=dict)

    def _content(self, request: int, heads: int, salt: int) -> torch.Tensor:
        made = self.made_keys if salt == 1 else self.made_queries
        return made[request] if request in made else super()._content(request, heads, salt)

    @property
    def memory(self) -> LocalMass:
        assert self.layer is not None
        return next(m for m in self.layer.memories if isinstance(m, LocalMass))

    def mass(self, request: int) -> torch.Tensor:
        """``[T, Hk]`` of a request's slots, whole pages."""
        pages = torch.tensor(self.pages_of[request])
        return self.memory.mass[pages].transpose(1, 2).flatten(0, 1)


def world(window: int = WINDOW, shuffle: int = 0, page: int = PAGE) -> Made:
    options = {
        "sink": SINKS * PAGE, "local": LOCAL, "budget": 64, "window": window, "dense_below": 100,
    }  # fmt: skip
    return Made(PolicyCase("infllm", {}), options, page, HEADS, GROUP, shuffle=shuffle)


def start_of(first: int, page: int = PAGE) -> int:
    """First local key of a window, from its first query."""
    return max((first + 1 - LOCAL) // page, -(-SINKS * PAGE // page)) * page


def sampled(start: int, stop: int, every: int) -> list[int]:
    return [position for position in range(start, stop) if position % every == every - 1]


def expected(made: Made, request: int, stop: int) -> torch.Tensor:
    """``[stop, Hk]``, window by window from the twin; all of it one prompt."""
    keys = made._content(request, HEADS, 1)[:stop]
    queries = made._content(request, HEADS * GROUP, 2)
    total, window = torch.zeros(stop, HEADS), made.config.window
    every = next(n for n in (32, 16, 8, 4, 2, 1) if window % n == 0 and EVERY % n == 0)
    for first in range(0, stop, window):
        end = min(first + window, stop)
        at = torch.tensor(sampled(first, end, every), dtype=torch.long)
        start = start_of(first, made.page)
        total[:end] += local_mass_reference(queries[at], keys[:end], at, start, SCALE)
    return total


@pytest.mark.parametrize(("page", "window"), [(8, 16), (8, 24), (8, 64), (16, 16), (64, 64)])
@pytest.mark.parametrize("stop", [8, 16, 17, 41, 200, 333])
def test_twin(page: int, window: int, stop: int) -> None:
    """In pages of 64, a sampled query stands in the middle of one."""
    made = world(window, page=page)
    made.prefill(1, stop)
    found, wanted = made.mass(1), expected(made, 1, stop)
    # Logits are sums of HEAD_DIM products, and what they are wrong by, probabilities are too.
    logit = SCALE * made.keys(1).norm(dim=-1).max() * made._content(1, 6, 2).norm(dim=-1).max()
    assert (found[:stop] - wanted).abs().max() <= HEAD_DIM * EPS * logit * wanted.max().clamp(1)
    assert (found[stop:] == 0).all()
    assert stop < 200 or (wanted > 0).any(0).all()


@pytest.mark.parametrize("chunk", [WINDOW, 10_000])
def test_equal_keys_share_the_mass_of_a_query(chunk: int) -> None:
    """A query that sees ``n`` local keys gives each of them ``1 / n``, in every query head."""
    made = world()
    made.made_queries[1] = torch.zeros(MAX_CONTEXT, HEADS * GROUP, HEAD_DIM)
    made.prefill(1, 100, chunk)
    wanted = torch.zeros(100)
    for position in sampled(0, 100, WINDOW):
        start = start_of(position // WINDOW * WINDOW)
        if start <= position:
            wanted[start : position + 1] += GROUP / (position + 1 - start)
    assert torch.allclose(made.mass(1)[:100], wanted[:, None].expand(-1, HEADS), rtol=4 * EPS)
    assert wanted[SINKS * PAGE] > 0
    assert wanted[SINKS * PAGE - 1] == 0


def test_orthogonal_keys() -> None:
    """Key ``t`` is unit vector ``t % D``; each query head looks for another one.

    Of ``n`` visible keys, ``m`` equal the query: their logits are ``length * SCALE``, the others'
    are 0.
    """
    made, length = world(), 8.0
    made.made_keys[1] = torch.eye(HEAD_DIM)[torch.arange(MAX_CONTEXT) % HEAD_DIM]
    made.made_keys[1] = made.made_keys[1][:, None].expand(-1, HEADS, -1).contiguous()
    made.made_queries[1] = length * torch.eye(HEAD_DIM)[: HEADS * GROUP].expand(MAX_CONTEXT, -1, -1)
    made.prefill(1, 160)
    wanted = torch.zeros(160, HEADS, dtype=torch.float64)
    for position in sampled(0, 160, WINDOW):
        visible = torch.arange(start_of(position // WINDOW * WINDOW), position + 1)
        for head in range(HEADS * GROUP):
            weights = torch.ones(len(visible), dtype=torch.float64)
            weights[visible % HEAD_DIM == head] = torch.tensor(length * SCALE).double().exp()
            wanted[visible, head // GROUP] += weights / weights.sum()
    assert torch.allclose(made.mass(1).double(), wanted, rtol=HEAD_DIM * EPS)


def test_only_sampled_queries_count() -> None:
    made, other, changed = world(), world(), world()
    queries = made._content(1, HEADS * GROUP, 2)
    others = torch.randn_like(queries)
    others[WINDOW - 1 :: WINDOW] = queries[WINDOW - 1 :: WINDOW]
    other.made_queries[1] = others
    changed.made_queries[1] = queries.clone()
    changed.made_queries[1][WINDOW * 5 - 1] *= -1
    for each in (made, other, changed):
        each.prefill(1, 200)
    assert torch.equal(made.mass(1), other.mass(1))
    differs = (made.mass(1) != changed.mass(1)).any(1).nonzero().flatten()
    assert differs.tolist() == list(range(start_of(WINDOW * 4), WINDOW * 5))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_keys_that_are_no_numbers_get_nothing(bad: float) -> None:
    made, without = world(), world()
    keys = made.keys(1).clone()
    keys[70, 1, 3] = bad
    made.made_keys[1] = keys
    made.prefill(1, 100)
    without.prefill(1, 100)
    found, wanted = made.mass(1), expected(made, 1, 100)
    assert found[70, 1] == 0
    assert found.isfinite().all()
    assert torch.allclose(found[:100], wanted, rtol=1e-5)
    assert torch.equal(found[:, [0, 2]], without.mass(1)[:, [0, 2]])
    # The rest share what every query has to give.
    assert torch.allclose(found[:, 1].sum(), without.mass(1)[:, 1].sum(), rtol=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF, 3e38])
def test_queries_that_are_no_numbers_give_nothing(bad: float) -> None:
    made, without = world(), world()
    made.made_queries[1] = made._content(1, HEADS * GROUP, 2).clone()
    made.made_queries[1][79, 2] = bad
    without.made_queries[1] = made._content(1, HEADS * GROUP, 2).clone()
    for each in (made, without):
        each.prefill(1, 64)
    before = made.mass(1).clone()
    for each in (made, without):
        each.run([Piece(1, 64, WINDOW, True)], cached=False)
    assert made.mass(1).isfinite().all()
    given = made.mass(1).sum(0) - torch.cat([before, torch.zeros(16, HEADS)]).sum(0)
    assert torch.allclose(given, torch.tensor([GROUP, GROUP - 1.0, GROUP]), rtol=1e-5)


def test_a_page_that_is_handed_on_forgets() -> None:
    memory = LocalMass(layer_of(torch.zeros(40 * 3, 1, PAGE, HEAD_DIM)))
    memory.mass.fill_(3)
    memory.seen.fill_(99)
    slots = torch.tensor([-1, 5 * PAGE + 2, 7 * PAGE, 7 * PAGE + 1, -3])
    memory.forget(slots)
    cleared = (memory.mass == 0).all(1).flatten().nonzero().flatten().tolist()
    assert cleared == slots[1:4].tolist()
    assert (memory.seen == 0).all(1).nonzero().flatten().tolist() == [7]


def test_pages_are_read_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fit, requests of one step get what they get alone."""
    pieces = [Piece(request, 0, 150 + 50 * request, True) for request in range(1, 5)]
    made = world()
    made.run(pieces)
    for most in (1, 7, 30):
        monkeypatch.setattr(local_mass, "MOST_PAGES", most)
        other = world(shuffle=most)
        other.run(pieces)
        for piece in pieces:
            assert torch.equal(made.mass(piece.request), other.mass(piece.request))
    assert (made.mass(4) > 0).any()


def test_bytes() -> None:
    """Per page and head, a float32 per token and one position."""
    memory = LocalMass(layer_of(torch.zeros(40 * 3, 1, PAGE, HEAD_DIM)))
    assert memory.nbytes() == 40 * 3 * 4 * (PAGE + 1)
