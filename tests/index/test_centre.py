"""Causal centring: the mean of the first window, on the request's first page, and then frozen."""

from __future__ import annotations

import pytest
import torch

from kvplug.index.centre import Centre, centre_reference
from kvplug.pages import PageGeometry
from tests.made_up import Piece, layer_of
from tests.streams import stream_of, watched

PAGE, WINDOW, HEADS, KV_HEADS, DIM = 8, 16, 6, 3, 16
GEOMETRY = PageGeometry(PAGE, WINDOW, 1, 8, 2, 0, 2)
NAN = float("nan")


def centre_of() -> Centre:
    return layer_of(num_pages=60).own(Centre)


def tables(requests: int) -> torch.Tensor:
    """``[requests, 20]`` distinct pages."""
    return torch.randperm(60)[: requests * 20].to(torch.int32).view(requests, 20)


def see(centre: Centre, batch: list[Piece], table: torch.Tensor, salt: float = 0.0) -> None:
    """One step of requests whose keys and queries follow from their names."""
    generators = [torch.Generator().manual_seed(piece.request) for piece in batch]
    queries = [torch.randn(200, HEADS, DIM, generator=g) + salt for g in generators]
    keys = [torch.randn(200, KV_HEADS, DIM, generator=g) - salt for g in generators]
    watched([centre], GEOMETRY, batch, table, queries, keys)


def test_twin() -> None:
    """Three prompts begin, one goes on, one decodes; one of them is shorter than the window."""
    batch = [
        Piece(1, 0, 64, True), Piece(2, 0, 5, True), Piece(3, 48, 16, True), Piece(4, 30, 1, False),
        Piece(5, 0, 16, True),
    ]  # fmt: skip
    table = torch.randperm(60)[:50].to(torch.int32).view(5, 10)
    queries = [torch.randn(70, HEADS, DIM) for _ in batch]
    keys = [torch.randn(70, KV_HEADS, DIM) for _ in batch]
    centre = centre_of()
    for tensor in centre.state:
        tensor.fill_(NAN)
    watched([centre], GEOMETRY, batch, table, queries, keys)
    step = stream_of(GEOMETRY, batch, table)
    for vectors, means in ((queries, centre.queries), (keys, centre.keys)):
        parts = [v[p.start : p.stop] for v, p in zip(vectors, batch, strict=True)]
        expected = centre_reference(torch.cat(parts), step)
        assert [page for page, _ in expected] == [int(table[row, 0]) for row in (0, 1, 4)]
        for page, mean in expected:
            # 16 summands of size 1 to 4, added in another order.
            torch.testing.assert_close(means[page], mean, rtol=0, atol=16 * 4 * 2**-24)
        untouched = torch.ones(60, dtype=torch.bool)
        untouched[[page for page, _ in expected]] = False
        assert means[untouched].isnan().all()


@pytest.mark.parametrize("chunk", [16, 32, 80])
def test_frozen_after_the_first_window(chunk: int) -> None:
    """Whatever the chunks, later windows and decoded tokens change nothing."""
    table = tables(1)
    alone = centre_of()
    see(alone, [Piece(1, 0, 16, True)], table)
    centre = centre_of()
    for start in range(0, 80, chunk):
        see(centre, [Piece(1, start, min(chunk, 80 - start), True)], table)
    see(centre, [Piece(1, 80, 9, False)], table, salt=3.0)
    assert all(torch.equal(a, b) for a, b in zip(centre.state, alone.state, strict=True))


def test_a_short_prompt_keeps_its_partial_window() -> None:
    """Decoded tokens complete the window; the mean stays that of the prompt, replayed or not."""
    table = tables(1)
    alone = centre_of()
    see(alone, [Piece(1, 0, 5, True)], table)
    centre = centre_of()
    see(centre, [Piece(1, 0, 5, True)], table)
    for position in range(5, 20):
        see(centre, [Piece(1, position, 1, False)], table, salt=2.0)
    assert all(torch.equal(a, b) for a, b in zip(centre.state, alone.state, strict=True))


def test_the_batch_does_not_matter() -> None:
    table = tables(2)
    together, first, second = centre_of(), centre_of(), centre_of()
    see(together, [Piece(1, 0, 30, True), Piece(2, 0, 16, True)], table)
    see(first, [Piece(1, 0, 30, True)], table[:1])
    see(second, [Piece(2, 0, 16, True)], table[1:])
    for whole, one, other in zip(together.state, first.state, second.state, strict=True):
        assert torch.equal(whole, one + other)


def test_new_content_has_its_own_means() -> None:
    table = tables(1)
    used, fresh = centre_of(), centre_of()
    see(used, [Piece(2, 0, 40, True)], table)
    for centre in (used, fresh):
        see(centre, [Piece(1, 0, 5, True)], table)
    assert all(torch.equal(a, b) for a, b in zip(used.state, fresh.state, strict=True))


def test_bytes_are_those_of_one_page() -> None:
    assert centre_of().nbytes() == 4 * DIM * (HEADS + KV_HEADS)
