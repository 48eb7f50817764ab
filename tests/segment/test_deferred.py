"""Short prompts are measured when they grow, and nothing that is found depends on when that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.segment.deferred import CONTEXTS
from tests.segment.prompting import DIM, HEADS, PAGE, WINDOW, Cache, Part, dealt
from tests.segment.test_cut import LENGTH, surprises

BELOW = 6 * WINDOW + 4
"""Tokens up to which nothing is retrieved: no whole number of pages."""
OPTIONS: dict[str, Any] = {"gamma": 0.5, "min_tokens": 2, "max_tokens": 24}


def keys_of(seed: int) -> torch.Tensor:
    """``[LENGTH, Hk, D]``."""
    return torch.randn(LENGTH, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def same(one: Cache, other: Cache, mine: list[int], theirs: list[int], tokens: int) -> bool:
    """Whether both learnt the same of a request, and found events in it."""
    a, b = one.learnt(mine, tokens), other.learnt(theirs, tokens)
    assert a[1]
    return torch.equal(a[0].nan_to_num(-1), b[0].nan_to_num(-1)) and a[1:] == b[1:]


def decode(cache: Cache, pages: list[int], start: int, stop: int) -> None:
    """Decodes tokens."""
    for position in range(start, stop):
        cache.step([Part(pages, position, torch.ones(stop), 1, prefilling=False)])


def nothing_waits(cache: Cache) -> bool:
    """Whether every page is cut and every row is free."""
    waiting = cache.deferred
    assert int(waiting.num_uncut[0]) == int((waiting.uncut > 0).sum())
    free = (waiting._row < 0).all() and (waiting._page < 0).all()
    return bool(free and not waiting.uncut.any())


@pytest.mark.parametrize("refine", ["none", "modularity", "conductance"])
@pytest.mark.parametrize("prompt", [BELOW, BELOW - 1, 5 * WINDOW + 3, PAGE + 1])
def test_a_short_prompt_is_measured_when_decoding_takes_it_further(
    prompt: int, refine: str
) -> None:
    pages, surprise, keys = dealt(LENGTH), surprises(3)[:prompt], keys_of(0)
    at_once = Cache(refine=refine, **OPTIONS)
    at_once.prefill(surprise, pages, LENGTH, keys=keys)
    waiting = Cache(BELOW, refine=refine, **OPTIONS)
    waiting.prefill(surprise, pages, 2 * WINDOW, keys=keys)
    assert waiting.model.asked == 0
    decode(waiting, pages, prompt, BELOW)
    assert waiting.model.asked == 0
    assert waiting.memory.surprise.isnan().all()
    decode(waiting, pages, BELOW, BELOW + 1)
    assert same(waiting, at_once, pages, pages, prompt)
    assert nothing_waits(waiting)
    measured = waiting.model.asked
    decode(waiting, pages, BELOW + 1, BELOW + 3)
    assert waiting.model.asked == measured


@pytest.mark.parametrize("chunk", [WINDOW, 2 * WINDOW, 5 * WINDOW, LENGTH])
def test_a_long_prompt_is_cut_as_if_nothing_had_waited(chunk: int) -> None:
    pages, surprise, keys = dealt(LENGTH), surprises(4), keys_of(1)
    at_once, waiting = (
        Cache(refine="modularity", **OPTIONS),
        Cache(BELOW, refine="modularity", **OPTIONS),
    )
    at_once.prefill(surprise, pages, chunk, keys=keys)
    waiting.prefill(surprise, pages, chunk, keys=keys)
    assert same(waiting, at_once, pages, pages, LENGTH)
    assert nothing_waits(waiting)


def test_pages_that_made_room_are_cut_all_the_same() -> None:
    """More short prompts than there is room for; the first, measured long ago, grows."""
    count, prompt = CONTEXTS + 3, 4 * WINDOW
    spare, each = dealt(10_000), BELOW // PAGE + 2
    tables = [spare[i * each : (i + 1) * each] for i in range(count)]
    waiting = Cache(prompt, **OPTIONS)
    for i, pages in enumerate(tables):
        waiting.prefill(surprises(i)[:prompt], pages, prompt)
    assert waiting.model.asked == (count - CONTEXTS) * prompt
    assert not waiting.memory.surprise[tables[0][: prompt // PAGE]].flatten()[1:].isnan().any()
    assert waiting.memory.surprise[tables[-1]].isnan().all()
    for i, pages in enumerate(tables):
        alone = Cache(**OPTIONS)
        alone.prefill(surprises(i)[:prompt], pages, prompt)
        decode(waiting, pages, prompt, prompt + 1)
        assert same(waiting, alone, pages, pages, prompt)
    assert nothing_waits(waiting)


def test_a_step_with_more_than_there_is_room_for_is_measured_at_once() -> None:
    count, prompt = 2 * CONTEXTS, 2 * WINDOW
    spare, each = dealt(10_000), prompt // PAGE + 1
    tables = [spare[i * each : (i + 1) * each] for i in range(count)]
    waiting = Cache(prompt, **OPTIONS)
    waiting.step([Part(p, 0, surprises(i), prompt) for i, p in enumerate(tables)])
    assert waiting.model.asked == count * prompt
    decode(waiting, tables[5], prompt, prompt + 1)
    alone = Cache(**OPTIONS)
    alone.prefill(surprises(5)[:prompt], tables[5], prompt)
    a, b = waiting.learnt(tables[5], prompt), alone.learnt(tables[5], prompt)
    assert torch.equal(a[0][1:], b[0][1:])
    assert a[1:] == b[1:]


def test_a_long_request_behind_a_short_one_s_prefix() -> None:
    """Its own pages were cut with the prefix's history; the short one's stay shared."""
    shared, surprise = 4 * WINDOW, surprises(7)
    theirs = dealt(LENGTH)
    spare = [page for page in dealt(10_000) if page not in theirs]
    mine = theirs[: shared // PAGE] + spare[: len(theirs) - shared // PAGE]
    cold, warm = Cache(**OPTIONS), Cache(BELOW, **OPTIONS)
    cold.prefill(surprise, mine, WINDOW)
    # The last shared state says what comes next, in this model: so that is shared too.
    short = torch.cat([surprise[: shared + 1], surprises(8)[shared + 1 : shared + WINDOW]])
    warm.prefill(short, theirs, LENGTH)
    warm.prefill(surprise, mine, 2 * WINDOW, start=shared)
    assert same(warm, cold, mine, mine, LENGTH)
    decode(warm, theirs, len(short), BELOW + 1)
    alone = Cache(**OPTIONS)
    alone.prefill(short, theirs, LENGTH)
    assert same(warm, alone, theirs, theirs, len(short))


@pytest.mark.parametrize("below", [0, 3 * WINDOW, BELOW])
def test_a_hit_on_pages_of_the_same_step(below: int) -> None:
    """vLLM's cache knows blocks as soon as they are scheduled, and in any order of the batch."""
    shared, surprise = 4 * WINDOW, surprises(9)
    theirs = dealt(LENGTH)
    spare = [page for page in dealt(10_000) if page not in theirs]
    mine = theirs[: shared // PAGE] + spare[: len(theirs)]
    cold, warm = Cache(**OPTIONS), Cache(below, **OPTIONS)
    cold.prefill(surprise, mine, WINDOW)
    warm.step([Part(mine, shared, surprise, LENGTH - shared), Part(theirs, 0, surprise, shared)])
    decode(warm, mine, LENGTH, LENGTH + 1)
    assert same(warm, cold, mine, mine, LENGTH)


def test_pages_handed_on_wait_for_nothing() -> None:
    pages = dealt(LENGTH)
    waiting = Cache(BELOW, **OPTIONS)
    waiting.prefill(surprises(2)[: 3 * WINDOW + 5], pages, LENGTH)
    assert not nothing_waits(waiting)
    assert waiting.deferred.nbytes() == 8 * waiting.deferred.shape.num_pages
    waiting.deferred.forget(torch.tensor([-1, -PAGE]))
    waiting.deferred.forget(torch.tensor([page * PAGE + 1 for page in pages]))
    assert not nothing_waits(waiting)
    waiting.deferred.forget(torch.tensor([page * PAGE for page in pages]))
    assert nothing_waits(waiting)
