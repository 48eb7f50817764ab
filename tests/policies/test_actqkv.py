"""ActQKV's claim: a token that stands out says what its window needs, and the mean drowns it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvplug.budget.entropy import EntropyBudget
from kvplug.index.representative import Representative
from kvplug.policies import make_stages
from kvplug.policies.actqkv import ActQkv
from kvplug.probe.activation import ActivationProbe
from tests.cases import PolicyCase
from tests.made_up import HEAD_DIM, MAX_CONTEXT, Attended, Piece, World

PAGE, WINDOW = 8, 16
NEEDLE = 11  # the page that one token asks for
FIRST = 400  # of the window that it stands in


class Asking(World):
    """Queries and keys point the same way, but for one page's and one token's."""

    def _content(self, request: int, heads: int, salt: int) -> torch.Tensor:
        noise = super()._content(request, heads, salt)[..., :HEAD_DIM]
        common, rare = torch.zeros(HEAD_DIM), torch.zeros(HEAD_DIM)
        common[0], rare[1] = 4.0, 12.0
        vectors = 0.5 * noise + common
        place = slice(NEEDLE * PAGE, NEEDLE * PAGE + PAGE) if salt == 1 else FIRST + 5
        vectors[place] = rare
        assert len(vectors) == MAX_CONTEXT
        return vectors


def pages(**options: Any) -> tuple[tuple[int, ...], ...]:
    """What the window attends to, per KV head."""
    regions = {"sink": 8, "local": 8, "budget": 5 * PAGE, "window": WINDOW, "dense_below": 0}
    made = Asking(PolicyCase("actqkv", options), regions, PAGE)
    made.prefill(1, FIRST)
    attended = made.run([Piece(1, FIRST, WINDOW, True)], cached=False)[1, FIRST]
    assert isinstance(attended, Attended)
    return attended.pages


@pytest.mark.parametrize("heads", ["all", "each"])
def test_one_token_that_stands_out_is_heard(heads: str) -> None:
    """One query of sixteen, where 45 pages match the other fifteen."""
    assert all(NEEDLE in row for row in pages(heads=heads))


@pytest.mark.parametrize("options", [{"sharpness": 0.0}, {"warm_up": 999}, {"probe": "mean"}])
def test_the_mean_query_drowns_it(options: dict[str, Any]) -> None:
    assert not any(NEEDLE in row for row in pages(**options))


def test_options_reach_their_stages() -> None:
    options = {
        "top": 3, "heads": "each", "warm_up": 2, "sharpness": 1.5, "share": "each",
        "temperature": 0.7,
    }  # fmt: skip
    stages = make_stages("actqkv", options)
    assert stages.index == Representative(top=3, metric="cosine", heads="each")
    assert stages.probe == ActivationProbe(warm_up=2, sharpness=1.5, share="each")
    assert stages.budget == EntropyBudget(temperature=0.7)
    assert ActQkv().stages().index == Representative(metric="cosine", heads="all")
