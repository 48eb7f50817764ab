"""InfLLM: what it stores for a page follows from the request alone, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.index.local_mass import LocalMass
from kvplug.index.representative import Representative, RepresentativeIndex
from kvplug.policies import make_stages
from tests.cases import PolicyCase
from tests.made_up import HEAD_DIM, Attended, Piece, World

PAGE, WINDOW, LOCAL, SINKS = 8, 16, 20, 2
COPY = 1000
"""Request ``COPY + n`` has the tokens of request ``n``, in a request of its own."""


@dataclass
class Copies(World):
    """A world in which two requests may have the same tokens, and others made-up ones."""

    made: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """(request, 1 for its keys or 2 for its queries) -> ``[MAX_CONTEXT, heads, D]``."""

    def _content(self, request: int, heads: int, salt: int) -> torch.Tensor:
        if (request, salt) in self.made:
            return self.made[request, salt]
        return super()._content(request % COPY, heads, salt)

    def stored(self, request: int, stop: int) -> tuple[torch.Tensor, ...]:
        """What is stored for a request's pages that end before position ``stop``.

        Mass; representatives where they are settled; whether they are.
        """
        assert self.layer is not None
        index, pages = self.layer.index, torch.tensor(self.pages_of[request][: stop // PAGE])
        local = next(m for m in self.layer.memories if isinstance(m, LocalMass))
        assert isinstance(index, RepresentativeIndex)
        assert self.pipeline.seals is not None
        sealed = self.pipeline.seals.flags[pages]
        vectors = index.vectors[pages].view(torch.int16) * sealed[:, None, None]
        return local.mass[pages].view(torch.int32), vectors, sealed


def world(shuffle: int = 0, **options: object) -> Copies:
    regions = {
        "sink": SINKS * PAGE, "local": LOCAL, "budget": 40, "window": WINDOW, "dense_below": 64,
    }  # fmt: skip
    return Copies(PolicyCase("infllm", options), regions, PAGE, shuffle=shuffle)


def same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for mine, other in zip(found, wanted, strict=True):
        assert torch.equal(mine, other)
    mass, _, sealed = wanted
    assert (mass != 0).any()
    assert sealed.any()


PROMPT = 411


@pytest.mark.parametrize("chunk", [WINDOW, 3 * WINDOW, 128])
def test_chunks_do_not_matter(chunk: int) -> None:
    whole, parts = world(), world(shuffle=3)
    whole.prefill(1, PROMPT)
    parts.prefill(1, PROMPT, chunk)
    same(parts.stored(1, PROMPT), whole.stored(1, PROMPT))


def test_the_batch_does_not_matter() -> None:
    alone, together = world(), world(shuffle=3)
    alone.prefill(1, PROMPT)
    alone.prefill(2, 300)
    together.prefill(2, 80)
    together.run([Piece(2, 80, 96, True), Piece(3, 0, 64, True), Piece(1, 0, 208, True)])
    for request in (2, 1):
        together.prefill(7, 64)  # whose pages are then free again
        together._free += together.pages_of.pop(7)
        start, stop = {2: (176, 300), 1: (208, PROMPT)}[request]
        together.run([Piece(request, start, stop - start, True)], cached=False)
    same(together.stored(1, PROMPT), alone.stored(1, PROMPT))
    same(together.stored(2, 300), alone.stored(2, 300))


def test_a_replay_is_as_decoded() -> None:
    decoded, replayed = world(), world(shuffle=3)
    for made in (decoded, replayed):
        made.prefill(1, 200)
    for position in range(200, 290):
        decoded.run([Piece(1, position, 1, False)], cached=False)
    for start, stop in ((200, 217), (217, 280), (280, 290)):
        replayed.run([Piece(1, start, stop - start, False)], cached=False)
    same(replayed.stored(1, 290), decoded.stored(1, 290))


def test_pages_that_were_used_before_do_not_matter() -> None:
    fresh, used = world(), world()
    fresh.prefill(1, PROMPT)
    for request in (4, 5):
        used.prefill(request, 900)
    for request in (4, 5):
        used._free += used.pages_of.pop(request)[::-1]
    used.prefill(1, PROMPT)
    same(used.stored(1, PROMPT), fresh.stored(1, PROMPT))


def hit(made: Copies, cached: int) -> int:
    """Gives the copy of request 1 what a prefix hit on ``cached`` tokens does; where it starts."""
    start = cached - made.pipeline.stages.hit_margin(LOCAL, WINDOW)
    made.pages_of[COPY + 1] = made.pages_of[1][: start // PAGE]
    return start


@pytest.mark.parametrize("chunk", [WINDOW, 400])
@pytest.mark.parametrize("other", [False, True], ids=["same", "other"])
def test_a_prefix_hit_is_as_good_as_a_cold_run(other: bool, chunk: int) -> None:
    """Before the copy comes, the first request stops, or goes on with other tokens."""
    cold, made = world(), world(shuffle=3)
    cold.prefill(1, PROMPT)
    made.prefill(1, 256)
    if other:
        with made.keys_differ_from(1, 256):
            made.run([Piece(1, 256, 144, True)], cached=False)
    shared = made.stored(1, 256)
    start = hit(made, 256)
    for first in range(start, PROMPT, chunk):
        made.run([Piece(COPY + 1, first, min(chunk, PROMPT - first), True)], cached=False)
    same(made.stored(COPY + 1, PROMPT), cold.stored(1, PROMPT))
    # The pages that both have were not written to again.
    mass = made.stored(1, 256)[0]
    assert torch.equal(mass[: start // PAGE], shared[0][: start // PAGE])


def test_a_hit_on_a_page_of_the_same_step() -> None:
    """vLLM lets a request hit blocks that another computes in the same step, in either order."""
    cold = world()
    cold.prefill(1, PROMPT)
    first = Piece(1, 0, 256, True)
    for turned in (False, True):
        made = world(shuffle=3)
        made.slots(1, 0, 256)
        start = hit(made, 256)
        second = Piece(COPY + 1, start, PROMPT - start, True)
        made.run([second, first] if turned else [first, second], cached=False)
        same(made.stored(COPY + 1, PROMPT), cold.stored(1, PROMPT))
        made.run([Piece(1, 256, PROMPT - 256, True)], cached=False)
        same(made.stored(1, PROMPT), cold.stored(1, PROMPT))


def test_finds_what_the_mean_of_a_page_hides() -> None:
    """InfLLM's claim: few keys stand for a page. Here 4 of 8 attract and 4 repel, equally.

    The local queries attend to the 4, so the page is known by them; its mean key is 0.
    """
    made, hidden = world(), 17
    page, after = hidden * PAGE, (hidden + 1) * PAGE
    keys, queries = made._content(1, 3, 1).clone(), made._content(1, 6, 2).clone()
    keys[:, :, 3] = queries[:, :, 3] = 0
    keys[page:after] = 0
    keys[page:after:2, :, 3], keys[page + 1 : after : 2, :, 3] = 6, -6
    queries[after : after + WINDOW, :, 3] = 6
    queries[400, :, 3] = 30
    made.made = {(1, 1): keys, (1, 2): queries}
    made.prefill(1, 400)
    assert made.layer is not None
    index = made.layer.index
    assert isinstance(index, RepresentativeIndex)
    known = index.vectors[made.pages_of[1][hidden]].float()
    assert torch.equal(known, 6 * torch.eye(HEAD_DIM)[3].expand(3, -1))
    assert (keys[page:after].mean(0) == 0).all()
    attended = made.run([Piece(1, 400, 1, False)], cached=False)[1, 400]
    assert isinstance(attended, Attended)
    assert all(hidden in row for row in attended.pages)


def test_options() -> None:
    stages = make_stages("infllm", {"top": 2, "heads": "each"})
    assert stages.index == Representative(top=2, heads="each")
    assert make_stages("infllm", {}).index == Representative(top=4, heads="all")
    for wrong in ({"top": 0}, {"heads": "some"}):
        with pytest.raises(KvplugError, match="representative"):
            make_stages("infllm", wrong)
