"""HAX-inspired: hash hits answer the query that asks, key selection is the same for all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.index.page_mass import PageMass
from kvplug.policies import make_stages
from kvplug.select.union import union_reference
from tests.cases import PolicyCase
from tests.made_up import Piece, World

PAGE, WINDOW, SINKS, BUDGET, POSITION = 8, 16, 2, 6, 700
FAR = range(SINKS, (POSITION + 1 - 20) // PAGE)
ASKS = Piece(1, POSITION, 1, False)


class Planted(World):
    """A request with one key that, centred, points where the centred query of POSITION does."""

    needle = 333

    def keys(self, request: int) -> torch.Tensor:
        """See :meth:`World.keys`."""
        keys = super().keys(request).clone()
        queries = self._content(request, self.num_kv_heads * self.group, 2)[:, :: self.group]
        asked = queries[POSITION] - queries[:WINDOW].mean(0)
        keys[self.needle] = keys[:WINDOW].mean(0) + 0.25 * asked
        return keys


def world(kind: type[World] = World, **options: Any) -> World:
    """A request whose prompt ends before POSITION."""
    sizes = {"sink": SINKS * PAGE, "local": 20, "budget": BUDGET * PAGE, "window": WINDOW}
    made = kind(PolicyCase("hax", options), {**sizes, "dense_below": 100}, page=PAGE)
    made.prefill(1, POSITION)
    return made


def selected(made: World, sign: float = 1.0) -> list[list[int]]:
    """Far pages that each KV head takes for the token at POSITION, with its query times sign."""
    plan = made.plan([ASKS], cached=False)
    assert plan is not None
    made.attend([ASKS], plan, sign)
    attended = dict(made.read([ASKS], plan))[1, POSITION]
    assert attended is not None
    return [[page for page in row if page in FAR] for row in attended.pages]


@pytest.mark.parametrize("options", [{}, {"bits": 8, "rounds": 8}, {"bits": 1, "rounds": 64}])
@pytest.mark.parametrize("split", [0.5, 1.0])
def test_the_key_that_points_where_the_query_does_is_found(
    options: dict[str, Any], split: float
) -> None:
    """A quarter as long as the query, so that attention mass would not find it."""
    needle = Planted.needle // PAGE
    assert all(needle in row for row in selected(world(Planted, split=split, **options)))
    assert not all(needle in row for row in selected(world(split=split, **options)))
    assert not all(needle in row for row in selected(world(Planted, split=0.0, **options)))


def test_key_selection_is_the_same_whoever_asks() -> None:
    """And it is the largest accumulated mass; with hashes, the query decides."""
    made = world(split=0.0)
    rows = selected(made)
    assert made.layer is not None
    (memory,) = (m for m in made.layer.memories if isinstance(m, PageMass))
    mass = memory.mass[made.pages_of[1]][FAR.start : FAR.stop].T
    expected = union_reference(torch.zeros_like(mass), mass, BUDGET, 0.0, FAR.start)
    assert rows == expected.tolist()
    assert selected(made, -1.0) == rows
    made = world(split=1.0)
    assert selected(made, -1.0) != selected(made)


def test_rows_are_full_where_hits_are_few() -> None:
    """16 bits leave a round few hits: key selection takes what the hashes do not."""
    made = world(bits=16, rounds=1, split=1.0)
    by_mass = selected(world(split=0.0))
    for row, alone in zip(selected(made), by_mass, strict=True):
        assert len(row) == BUDGET
        assert len(set(row) & set(alone)) >= BUDGET // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "rounds": 9}, "bits * rounds <= 64, not 8, 9."),
        ({"split": 1.5}, "0 <= split <= 1, not 1.5."),
        ({"last": 0}, "last >= 1"),
        ({"round": 2}, "Unknown option 'round' of policy 'hax'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KvplugError) as error:
        make_stages("hax", options)
    assert message in str(error.value)
