"""Surprise segmentation between steps: prefix hits, decoded tokens, pages handed on; options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.segment.surprise import Surprise
from tests.made_up import layer_of
from tests.segment.prompting import PAGE, WINDOW, Cache, Part, dealt
from tests.segment.test_cut import LENGTH, surprises


def test_the_first_token_of_a_step_has_its_surprise() -> None:
    """It follows from the hidden state before, which an earlier step computed."""
    surprise, pages = torch.full((LENGTH,), 0.5), dealt(LENGTH)
    surprise[2 * WINDOW] = 9
    cache = Cache()
    cache.prefill(surprise, pages, WINDOW)
    stored, boundaries, _ = cache.learnt(pages, LENGTH)
    assert float(stored[2 * WINDOW]) == pytest.approx(9, rel=1e-4)
    assert boundaries == [2 * WINDOW]


def test_a_prefix_hit_is_as_good_as_a_cold_run() -> None:
    """Also where the request that left the prefix went on in another way."""
    shared, others = 4 * WINDOW, surprises(2)
    # The last shared state says what comes next, in this model: so that is shared too.
    mine = torch.cat([others[: shared + 1], surprises(5)[shared + 1 :]])
    cold, warm = Cache(gamma=0.5), Cache(gamma=0.5)
    pages = dealt(LENGTH)
    cold.prefill(mine, pages, WINDOW)
    spare = [page for page in dealt(10_000) if page not in pages]
    theirs = pages[: shared // PAGE] + spare[: len(pages)]
    warm.prefill(others, theirs, 2 * WINDOW)
    warm.prefill(mine, pages, 2 * WINDOW, start=shared)
    a, b = cold.learnt(pages, LENGTH), warm.learnt(pages, LENGTH)
    assert torch.equal(a[0][1:], b[0][1:])
    assert a[1:] == b[1:]
    assert [t for t in a[1] if t >= shared]


def test_a_hit_may_join_pages_of_several_requests() -> None:
    """A shorter prompt's part of a window, then the rest from one that went on."""
    surprise, whole = surprises(6), 4 * WINDOW
    cold, warm = Cache(gamma=0.5), Cache(gamma=0.5)
    pages = dealt(LENGTH)
    cold.prefill(surprise, pages, WINDOW)
    spare = [page for page in dealt(10_000) if page not in pages]
    short, longer = spare[: len(pages)], spare[len(pages) : 2 * len(pages)]
    warm.prefill(surprise[: whole - WINDOW + PAGE], short, 2 * WINDOW)
    warm.prefill(surprise[: whole + 1], longer, 2 * WINDOW)
    inside = (whole - WINDOW) // PAGE + 1
    joined = [*short[:inside], *longer[inside : whole // PAGE], *pages[whole // PAGE :]]
    warm.prefill(surprise, joined, 2 * WINDOW, start=whole)
    a, b = cold.learnt(pages, LENGTH), warm.learnt(joined, LENGTH)
    assert torch.equal(a[0][1:], b[0][1:])
    assert a[1:] == b[1:]


def test_decoded_tokens_have_no_surprise() -> None:
    """Nor has the first token behind a block that decoding filled."""
    cache, pages, surprise = Cache(), dealt(LENGTH), torch.full((LENGTH,), 0.5)
    surprise[40:] = 9
    cache.prefill(surprise[: 2 * WINDOW + 3], pages, 3 * WINDOW)
    for position in range(2 * WINDOW + 3, 3 * WINDOW):
        cache.step([Part(pages, position, surprise, 1, prefilling=False)])
    cache.step([Part(pages, 3 * WINDOW, surprise, WINDOW)])
    stored, boundaries, _ = cache.learnt(pages, LENGTH)
    assert not stored[1 : 2 * WINDOW + 3].isnan().any()
    assert stored[2 * WINDOW + 3 : 3 * WINDOW + 1].isnan().all()
    assert not stored[3 * WINDOW + 1 : 4 * WINDOW].isnan().any()
    assert boundaries[0] == 3 * WINDOW + 1


def test_pages_handed_on_forget() -> None:
    cache, pages = Cache(gamma=0.0, min_tokens=1), dealt(LENGTH)
    cache.prefill(surprises(4), pages, WINDOW)
    assert cache.learnt(pages, LENGTH)[2]
    assert cache.memory.known.any()
    cache.write(torch.zeros(LENGTH, 2, 16), torch.cat(
        [torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages]
    )[:LENGTH])  # fmt: skip
    stored, boundaries, starts = cache.learnt(pages, LENGTH)
    assert stored.isnan().all()
    assert boundaries == starts == []
    assert not cache.memory.known.any()


def test_padding_is_not_written() -> None:
    cache, pages = Cache(gamma=0.0), dealt(LENGTH)
    cache.prefill(surprises(4), pages, WINDOW)
    before = cache.learnt(pages, LENGTH)
    for memory in (cache.memory, cache.events):
        memory.forget(torch.tensor([-1, -PAGE]))
    after = cache.learnt(pages, LENGTH)
    assert torch.equal(before[0][1:], after[0][1:])
    assert before[1:] == after[1:]


def test_size_counts_one_hidden_state_a_window() -> None:
    cache = Cache()
    cache.prefill(surprises(4), dealt(LENGTH), WINDOW)
    memory = cache.memory
    assert memory.hidden is not None
    row = memory.hidden.shape[1] * memory.hidden.itemsize
    tokens = memory.shape.num_pages * PAGE
    assert memory.nbytes() == tokens * 5 + memory.shape.num_pages + tokens // WINDOW * row


@pytest.mark.parametrize(("local", "limit"), [(1, 16), (15, 16), (16, 16), (40, 32), (64, 64)])
def test_steps_stay_within_the_local_region(local: int, limit: int) -> None:
    """The last window's far pages then end before the step's first token."""
    assert Surprise().chunk_limit(local, WINDOW) == limit
    last_query = limit - WINDOW
    assert last_query + 1 - local <= 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": -0.1}, "gamma >= 0"),
        ({"gamma": float("nan")}, "gamma >= 0"),
        ({"history": 1}, "history >= 2"),
        ({"min_tokens": 0}, "min_tokens"),
        ({"min_tokens": 65, "max_tokens": 64}, "min_tokens <= max_tokens"),
        ({"refine": "modularty"}, "did you mean 'modularity'"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(KvplugError, match=words) as refused:
        Surprise(**options)
    assert str(refused.value).endswith(".")


def test_refinement_needs_a_readable_cache() -> None:
    with pytest.raises(KvplugError, match="reads keys back"):
        Surprise(refine="modularity").for_layer(layer_of())
    assert Surprise(refine="modularity").needs_every_head
    Surprise().for_layer(layer_of())
    assert not Surprise().needs_every_head
