"""Mean densities on pages: what windows hand on and learn, in the order of the step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kvplug.budget.density import _hand_on, _learn
from kvplug.carry import NOWHERE, carried
from kvplug.kernels.density_means import (
    CarriedDensity,
    hand_on_densities,
    hand_on_densities_reference,
    learn_densities,
    learn_densities_reference,
)

WINDOW, PAGE, LAYERS, HEADS, NUM_PAGES = 32, 8, 3, 3, 70
STEP = [  # request, first token, tokens, part of the prompt, scored
    (0, 0, 32, True, False),
    (0, 32, 32, True, True),
    (0, 64, 13, True, True),
    (1, 96, 1, False, True),  # begins a window
    (2, 120, 1, False, True),  # begins a window's last page
    (2, 121, 1, False, True),  # moves nothing
    (3, 64, 32, True, True),  # goes on from pages that request 0 fills
    (3, 96, 25, True, True),
]


class Made:
    """A step's windows as the kernels and as the stage on CPU see them."""

    def __init__(self, device: str) -> None:
        table = (torch.randperm(NUM_PAGES)[: 4 * 16].view(4, 16)).int()
        table[3, :8] = table[0, :8]
        self.table = table
        pages = [carried(first, first + n, prompt, WINDOW, PAGE) for _, first, n, prompt, _ in STEP]
        self.moving = [s for s, places in enumerate(pages) if places[1] != NOWHERE]
        self.known = torch.rand(NUM_PAGES, LAYERS, 2)
        self.known[..., 1] = torch.randint(1, 9, (NUM_PAGES, LAYERS))
        self.found = torch.rand(len(STEP), HEADS)  # by window; the kernel's rows are in disorder
        self.found[2] = torch.nan
        self.found[6, 1] = torch.nan
        self.order = torch.randperm(len(STEP))
        strided = torch.nn.functional.pad(table, (0, 3)).to(device)[:, :16]

        def column(values: list[int]) -> torch.Tensor:
            return torch.tensor([values[s] for s in self.moving], dtype=torch.int32, device=device)

        before, here, also = (column([places[i] for places in pages]) for i in range(3))
        prompts = column([int(w[3]) for w in STEP])
        request = column([w[0] for w in STEP])
        self.carried = CarriedDensity(
            strided, request, before, here, also, prompts, self.known.to(device)
        )
        places = [int((self.order == s).nonzero()) if w[4] else -1 for s, w in enumerate(STEP)]
        self.rows = column(places)
        self.rows_found = self.found[self.order].contiguous().to(device)

    def fresh(self) -> CarriedDensity:
        return self.carried._replace(means=self.known.clone().to(self.carried.means.device))

    def on_cpu(self, rank: int, learns: bool) -> torch.Tensor:
        """``[pages, L, 2]`` by the stage on CPU."""
        means = self.known.clone()
        request, first, tokens = (np.array([w[i] for w in STEP], np.int32) for i in range(3))
        prompt, scored = (np.array([w[i] for w in STEP]) for i in (3, 4))
        windows = (request, tokens, first + tokens, prompt, self.table.numpy(), WINDOW, PAGE)
        _hand_on(*windows, rank, means.numpy())
        if learns:
            found = self.found.numpy()[scored]
            _learn(found, scored, *windows, rank, means.numpy())
        return means


@pytest.mark.parametrize("rank", [0, 2])
def test_handing_on(rank: int, device: str) -> None:
    """As the stage on CPU, to the bit; later layers leave decoded tokens to the first."""
    made = Made(device)
    for function in (hand_on_densities, hand_on_densities_reference):
        carried = made.fresh()
        function(carried, rank)
        assert torch.equal(carried.means.cpu(), made.on_cpu(rank, False))
    assert not torch.equal(carried.means.cpu(), made.known)


@pytest.mark.parametrize("rank", [0, 1])
def test_learning(rank: int, device: str) -> None:
    """Windows of one request, and one that goes on from another's pages of the same step."""
    made = Made(device)
    results = []
    pairs: list[tuple[Callable[..., None], Callable[..., None]]] = [
        (hand_on_densities, learn_densities),
        (hand_on_densities_reference, learn_densities_reference),
    ]
    for hand_on, learn in pairs:
        carried = made.fresh()
        hand_on(carried, rank)
        learn(carried, rank, made.rows, made.rows_found)
        results.append(carried.means.cpu())
    # Densities are at most 1, and means of up to 11 of them are rounded a few times.
    assert (results[0] - results[1]).abs().max() <= 2**-21
    assert (results[0] - made.on_cpu(rank, True)).abs().max() <= 2**-21
    counts = results[0][..., rank, 1]
    assert counts[made.table[0, 7]] == 1  # the second window; the first was not scored
    assert counts[made.table[0, 8]] == 1  # the third has no numbers
    assert counts[made.table[3, 11]] == 2  # of the other request, one head of which has none
    assert counts[made.table[3, 12]] == 3


def test_nothing_to_carry(device: str) -> None:
    made = Made(device)
    columns = {name: getattr(made.carried, name)[:0] for name in CarriedDensity._fields[1:6]}
    empty = made.carried._replace(**columns)
    hand_on_densities(empty, 0)
    learn_densities(empty, 0, made.rows[:0], made.rows_found)
    assert torch.equal(empty.means.cpu(), made.known)


def test_what_cannot_be_read_is_refused(device: str) -> None:
    made = Made(device)
    with pytest.raises(ValueError, match="There are 3 layers, not 3"):
        hand_on_densities(made.carried, 3)
    with pytest.raises(ValueError, match=r"here must be int32"):
        hand_on_densities(made.carried._replace(here=made.carried.here.long()), 0)
    with pytest.raises(ValueError, match=r"rows must be int32"):
        learn_densities(made.carried, 0, made.rows[1:], made.rows_found)
