"""From surprises to events: threshold, limits, page edges; the same in any chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.segment.cut import boundaries_reference, starts_reference
from kvplug.select.event_choice import find_events
from tests.segment.prompting import DIM, HEADS, PAGE, WINDOW, Cache, Part, dealt

LENGTH = 7 * WINDOW + 5


def surprises(seed: int, kind: str = "spikes") -> torch.Tensor:
    """``[LENGTH]`` surprises; distinct, so that no threshold is met exactly."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(LENGTH, generator=generator)
    if kind == "noise":
        return noise * 5
    spikes = torch.rand(LENGTH, generator=generator) < 0.08
    return noise * 0.5 + spikes * (5 + noise)


def random_keys(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(LENGTH // 10 + 1, HEADS, DIM, generator=generator)
    return steps.repeat_interleave(10, 0)[:LENGTH] + torch.randn(
        LENGTH, HEADS, DIM, generator=generator
    )


@settings(max_examples=60, deadline=None)  # the first call compiles
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["noise", "spikes"]),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    history=st.sampled_from([2, 20, 64, 4096]),
    least=st.integers(1, 20),
    most=st.sampled_from([20, 32, 48]),
    refine=st.sampled_from(["none", "modularity", "conductance"]),
    windows=st.integers(1, 8),
)
def test_is_the_reference_in_any_chunks(
    seed: int, kind: str, gamma: float, history: int, least: int, most: int, refine: str,
    windows: int,
) -> None:  # fmt: skip
    surprise, keys, pages = surprises(seed, kind), random_keys(seed), dealt(LENGTH, seed)
    cache = Cache(gamma=gamma, history=history, min_tokens=least, max_tokens=most, refine=refine)
    cache.prefill(surprise, pages, windows * WINDOW, keys=keys)
    stored, found, starts = cache.learnt(pages, LENGTH)
    assert stored[0].isnan()
    torch.testing.assert_close(stored[1:], surprise[1:], rtol=1e-4, atol=1e-5)
    expected = boundaries_reference(stored, WINDOW, cache.segmenter.cutting, keys, refine)
    assert found == expected
    assert starts == starts_reference(expected, LENGTH, PAGE)


@pytest.mark.parametrize("level", [0.0, 0.1, 3.7])
def test_constant_surprise_is_uniform(level: float) -> None:
    cache, pages = Cache(max_tokens=32), dealt(LENGTH)
    cache.prefill(torch.full((LENGTH,), level), pages, 3 * WINDOW)
    assert cache.learnt(pages, LENGTH)[1:] == ([], [])


@pytest.mark.parametrize("spike", [20, 31, 32, 33, 47, 48, 51, 52, 90])
def test_one_spike_is_one_boundary(spike: int) -> None:
    """At the surprising token itself, and on the page whose edge is nearest."""
    surprise = torch.full((LENGTH,), 0.5)
    surprise[spike] = 9
    cache, pages = Cache(), dealt(LENGTH)
    cache.prefill(surprise, pages, 2 * WINDOW)
    _, boundaries, starts = cache.learnt(pages, LENGTH)
    assert boundaries == [spike]
    assert starts == [(spike + PAGE // 2) // PAGE]


@pytest.mark.parametrize("later", [0.5, 50.0])
def test_the_first_window_takes_its_own_statistics(later: float) -> None:
    """Of what lies up to the end of the page: the window behind it may be another request's."""
    surprise = torch.full((LENGTH,), 0.5)
    surprise[5] = 9
    surprise[2 * PAGE - 4 : 2 * PAGE] = later
    cache, pages = Cache(min_tokens=4), dealt(LENGTH)
    cache.prefill(surprise, pages, WINDOW)
    assert 5 in cache.learnt(pages, LENGTH)[1]


def test_history_says_what_is_surprising() -> None:
    """A value that stood out from calm tokens does not from restless ones."""
    restless = torch.tensor([0.0, 8.0]).repeat(LENGTH)[:LENGTH]
    calm = torch.full((LENGTH,), 0.5)
    for before, expected in ((calm, [70]), (restless, [])):
        surprise = calm.clone()
        surprise[:64] = before[:64]
        surprise[70] = 6
        cache, pages = Cache(min_tokens=8, history=64), dealt(LENGTH)
        cache.prefill(surprise, pages, WINDOW)
        assert [t for t in cache.learnt(pages, LENGTH)[1] if 64 <= t < 80] == expected


@pytest.mark.parametrize("refine", ["none", "modularity"])
def test_infinite_gamma_finds_nothing(refine: str) -> None:
    cache, pages = Cache(gamma=float("inf"), refine=refine), dealt(LENGTH)
    cache.prefill(surprises(3), pages, 2 * WINDOW)
    assert cache.learnt(pages, LENGTH)[1:] == ([], [])


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 1000), st.sampled_from([8, 11, 16]), st.sampled_from([1, 2, 4]))
def test_lengths_are_within_limits_and_events_a_partition(seed: int, least: int, most: int) -> None:
    least = min(least, most * PAGE)
    cache, pages = Cache(gamma=0.0, min_tokens=least, max_tokens=most * PAGE), dealt(LENGTH)
    cache.prefill(surprises(seed), pages, 2 * WINDOW)
    _, boundaries, _ = cache.learnt(pages, LENGTH)
    assert all(b - a >= least for a, b in zip([0, *boundaries], boundaries, strict=False))
    begin = np.zeros(len(pages) + 1, np.int32)
    count = find_events(
        np.array(pages), cache.events.starts.numpy(), cache.events.most_pages, begin
    )
    assert begin[0] == 0
    assert begin[count] == len(pages)
    lengths = np.diff(begin[: count + 1])
    assert lengths.min() >= 1
    assert lengths.max() <= most


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000), refine=st.sampled_from(["none", "modularity", "conductance"]),
    length=st.integers(1, LENGTH),
)  # fmt: skip
def test_a_page_follows_from_the_tokens_up_to_its_end(seed: int, refine: str, length: int) -> None:
    """vLLM's prefix cache takes full pages of a shorter prompt for those of a longer one."""
    surprise, keys, pages = surprises(seed), random_keys(seed), dealt(LENGTH)
    full = length // PAGE * PAGE
    learnt = []
    for tokens in (length, LENGTH):
        cache = Cache(gamma=0.5, min_tokens=4, refine=refine)
        cache.prefill(surprise[:tokens], pages, 2 * WINDOW, keys=keys)
        learnt.append(cache.learnt(pages[: full // PAGE], full))
    assert torch.equal(learnt[0][0][1:], learnt[1][0][1:])
    assert learnt[0][1:] == learnt[1][1:]


@pytest.mark.parametrize("metric", ["modularity", "conductance"])
@pytest.mark.parametrize("late", [1, 3])
def test_refinement_moves_the_boundary_to_the_true_edge(metric: str, late: int) -> None:
    """Two topics, and the surprise comes a few tokens into the second."""
    edge = 58
    keys = torch.zeros(LENGTH, HEADS, DIM)
    keys[:edge, :, 0] = 1
    keys[edge:, :, 1] = 1
    surprise = torch.full((LENGTH,), 0.5)
    surprise[edge + late] = 9
    pages = dealt(LENGTH)
    for refine, expected in (("none", edge + late), (metric, edge)):
        cache = Cache(refine=refine, min_tokens=2)
        cache.prefill(surprise, pages, 2 * WINDOW, keys=keys)
        assert cache.learnt(pages, LENGTH)[1] == [expected]


def test_a_boundary_stays_on_its_page() -> None:
    """What a finished page holds may be shared; nothing behind it may change it."""
    edge = 3 * WINDOW - 2
    keys = torch.zeros(LENGTH, HEADS, DIM)
    keys[:edge, :, 0] = 1
    keys[edge:, :, 1] = 1
    surprise = torch.full((LENGTH,), 0.5)
    surprise[edge + 6] = 9
    cache, pages = Cache(refine="modularity"), dealt(LENGTH)
    cache.prefill(surprise[: 3 * WINDOW], pages, WINDOW, keys=keys)
    before = cache.learnt(pages, 3 * WINDOW)
    cache.prefill(surprise, pages, WINDOW, start=3 * WINDOW, keys=keys)
    after = cache.learnt(pages, 3 * WINDOW)
    assert after[1] == before[1] == []
    assert cache.learnt(pages, LENGTH)[1] == [3 * WINDOW]


def test_alone_as_in_a_batch() -> None:
    """With other prompts and decoding requests around it."""
    alone, together = Cache(gamma=0.5), Cache(gamma=0.5)
    surprise, pages = surprises(1), dealt(LENGTH)
    alone.prefill(surprise, pages, WINDOW)
    deal = iter(p for p in dealt(10_000) if p not in pages)
    for first in range(0, LENGTH, 3 * WINDOW):
        others = [[next(deal) for _ in range(4)] for _ in range(2)]
        mine = Part(pages, first, surprise, min(3 * WINDOW, LENGTH - first))
        together.step(
            [
                Part(others[0], 20, surprises(7), 1, prefilling=False),
                Part(others[1], 0, surprises(8), WINDOW + 3),
                mine,
                Part(others[0], 21, surprises(9), 2, prefilling=False),
            ]
        )
    assert alone.learnt(pages, LENGTH)[1:] == together.learnt(pages, LENGTH)[1:]
