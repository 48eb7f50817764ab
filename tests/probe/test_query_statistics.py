"""Query statistics: those of the whole prompt so far, on its own pages, and of nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from kvplug.probe.query_statistics import QueryStatistics, pooled_reference
from tests.cases import PolicyCase
from tests.made_up import HEAD_DIM, Piece, World

PAGE, WINDOW, HEADS = 4, 16, 6
BLOCK = WINDOW // PAGE
CASE = PolicyCase("quest", {"probe": "activation"})
State = tuple[torch.Tensor, ...]


class Watched(World):
    """A world whose queries a test may change, and whose statistics it may read."""

    changed: dict[tuple[int, int], float]

    def _content(self, request: int, heads: int, salt: int) -> torch.Tensor:
        mine = super()._content(request, heads, salt)
        for (row, token), value in getattr(self, "changed", {}).items():
            if salt == 2 and row == request:
                mine[token, 1] = value  # the second head's query
        return mine

    @property
    def memory(self) -> QueryStatistics:
        assert self.layer is not None
        return next(m for m in self.layer.memories if isinstance(m, QueryStatistics))

    def after(self, request: int, position: int) -> State:
        """Mean, variance and counts, after the window of ``position``, which may be unfinished."""
        opening = position // WINDOW * BLOCK
        last = opening + (BLOCK - 1 if position % WINDOW == WINDOW - 1 else 0)
        page = self.pages_of[request][last]
        return tuple(tensor[page].clone() for tensor in self.memory.state)

    def chain(self, request: int, stop: int) -> list[State]:
        """The state after every window of a request."""
        ends = [min(first + WINDOW, stop) for first in range(0, stop, WINDOW)]
        return [self.after(request, end - 1) for end in ends]


def watched(shuffle: int = 0, dirt: float = 0.0) -> Watched:
    """A world in which some windows are dense and some sparse, its memory full of ``dirt``."""
    options = {"sink": 8, "local": 8, "budget": 64, "window": WINDOW, "dense_below": 64}
    made = Watched(CASE, options, PAGE, shuffle=shuffle)
    for tensor in made.memory.state:
        tensor.fill_(dirt)
    return made


def equal(some: list[State], other: list[State]) -> bool:
    """Bit for bit."""
    pairs = [zip(x, y, strict=True) for x, y in zip(some, other, strict=True)]
    return all(torch.equal(a, b) for pair in pairs for a, b in pair)


def prompt(made: Watched, request: int, stop: int) -> torch.Tensor:
    """``[stop, H, D]`` float64 queries."""
    return made._content(request, HEADS, 2)[:stop].double()


def assert_statistics_of(state: State, queries: torch.Tensor) -> None:
    """Rounding of sums over a window and of as many updates as there are windows."""
    mean, variance, counts = state
    assert (counts == len(queries)).all()
    assert torch.allclose(mean.double(), queries.mean(0), atol=3e-6)
    expected = queries.var(0) if len(queries) > 1 else torch.zeros_like(queries[0])
    assert torch.allclose(variance.double(), expected, rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize("stop", [1, 2, 16, 17, 32, 33, 300, 611])
@pytest.mark.parametrize("limit", [WINDOW, 64, 640])
def test_mean_and_variance_of_the_whole_prefix(stop: int, limit: int) -> None:
    """A partial last window, even of one token, counts too."""
    made = watched()
    made.prefill(1, stop, limit)
    queries = prompt(made, 1, stop)
    for number, state in enumerate(made.chain(1, stop)):
        assert_statistics_of(state, queries[: (number + 1) * WINDOW])


@pytest.mark.parametrize("shift", [0.0, 1e3])
@pytest.mark.parametrize("lengths", [[1], [1, 1], [5, 1, 9], [16] * 9, [1, 30]], ids=str)
def test_twin_is_the_textbook(lengths: list[int], shift: float) -> None:
    queries = torch.randn(sum(lengths), HEADS, HEAD_DIM).double() + shift
    mean, variance, count = pooled_reference(list(queries.split(lengths)))
    assert count == len(queries)
    assert torch.allclose(mean, queries.mean(0), rtol=1e-9)
    if count > 1:
        assert torch.allclose(variance, queries.var(0), rtol=1e-9)


def test_twin() -> None:
    made = watched()
    made.prefill(1, 200)
    mean, variance, counts = made.after(1, 199)
    windows = list(prompt(made, 1, 200).split(WINDOW))
    expected = pooled_reference(windows)
    assert torch.allclose(mean.double(), expected[0], atol=3e-6)
    assert torch.allclose(variance.double(), expected[1], rtol=3e-5)
    assert (counts == expected[2]).all()


@pytest.mark.parametrize("limit", [WINDOW, 3 * WINDOW, 64, 256])
def test_chunks_pages_and_batch_do_not_matter(limit: int) -> None:
    """Bit for bit; nor does what pages held before."""
    once = watched()
    once.prefill(1, 611, 640)
    expected = once.chain(1, 611)
    chunked = watched(shuffle=3, dirt=math.nan)
    chunked.prefill(1, 611, limit)
    assert equal(chunked.chain(1, 611), expected)
    batched = watched(dirt=7.0)
    batched.prefill(1, 256, limit)
    batched.prefill(2, 99)
    batched.run(
        [Piece(2, 99, 1, False), Piece(1, 256, 355, True), Piece(3, 0, 48, True)], cached=False
    )
    assert equal(batched.chain(1, 611), expected)


@pytest.mark.parametrize("stop", [40, 48])
def test_decoding_hands_it_on(stop: int) -> None:
    """One by one, and replayed in a single step over several blocks, on other pages."""
    made = watched(dirt=math.nan)
    made.prefill(1, stop)
    expected = made.after(1, stop - 1)
    for position in range(stop, 101):
        made.run([Piece(1, position, 1, False)], cached=False)
    replayed = watched(shuffle=2, dirt=3.0)
    replayed.prefill(1, stop)
    replayed.run([Piece(1, stop, 101 - stop, False)], cached=False)
    for run in (made, replayed):
        assert equal(run.chain(1, 101)[stop // WINDOW :], [expected] * (7 - stop // WINDOW))
        assert equal([run.after(1, 90)], [expected])  # where an unfinished window looks


def test_the_next_turn_goes_on_from_there() -> None:
    """Its prompt's windows pool with the first prompt's, not with what was decoded between."""
    made = watched()
    made.prefill(1, 64)
    made.run([Piece(1, 64, 48, False)], cached=False)
    made.run([Piece(1, 112, 40, True)], cached=False)
    queries = prompt(made, 1, 152)
    assert_statistics_of(made.after(1, 151), torch.cat([queries[:64], queries[112:]]))


def test_a_prefix_hit_is_as_good_as_a_cold_run() -> None:
    """And what one request makes of a shared prefix stays with that request."""
    cold, made = watched(), watched(shuffle=1)
    cold.prefill(1, 300)
    made.prefill(1, 256)
    shared = made.chain(1, 256)
    with made.keys_differ_from(1, 256):  # queries, too
        made.run([Piece(1, 256, 100, True)], cached=False)
        made.run([Piece(1, 356, 1, False)], cached=False)
    assert equal(made.chain(1, 256), shared)
    made.pages_of[1] = made.pages_of[1][: 256 // PAGE]
    made.run([Piece(1, 256, 44, True)], cached=False)
    assert equal(made.chain(1, 300), cold.chain(1, 300))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("token", [0, 20, 70])
def test_a_bad_query_spoils_one_window_of_one_head(value: float, token: int) -> None:
    """As 3e38 does, whose square is infinite."""
    made = watched()
    made.changed = {(1, token): value}
    made.prefill(1, 80)
    clean = watched()
    clean.prefill(1, 80)
    others = [head for head in range(HEADS) if head != 1]
    found, expected = made.after(1, 79), clean.after(1, 79)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[others], b[others])
    first = token // WINDOW * WINDOW
    queries = prompt(clean, 1, 80)
    kept = torch.cat([queries[:first], queries[first + WINDOW :]])
    assert_statistics_of(tuple(tensor[1:2] for tensor in found), kept[:, 1:2])


@pytest.mark.parametrize("end", range(100, 113))
def test_a_shorter_prompt_leaves_nothing_behind(end: int) -> None:
    """Of prompts with a common prefix, the one that completed the window counts.

    vLLM may find a window's first pages where it was left unfinished, and the others where not.
    """
    cold, made = watched(), watched()
    cold.prefill(1, 160)
    made.prefill(1, end)
    short = made.pages_of[1][: end // PAGE]
    made.pages_of[1] = short[: 96 // PAGE]
    made.run([Piece(1, 96, 16, True)], cached=False)
    made.pages_of[1][: len(short)] = short
    made.run([Piece(1, 112, 48, True)], cached=False)
    assert equal([made.after(1, 159)], [cold.after(1, 159)])


def test_one_page_of_a_window_is_touched() -> None:
    """And its size says so."""
    made = watched()
    made.prefill(1, 640)
    touched = {
        page for page in range(made.num_pages) if any(t[page].any() for t in made.memory.state)
    }
    assert touched == set(made.pages_of[1][BLOCK - 1 :: BLOCK])
    per_window = HEADS * (2 * HEAD_DIM + 1) * 4
    assert made.memory.nbytes() == made.num_pages / BLOCK * per_window
