"""Mass by slot: every window counts once for a page, in order, and goes with the page's keys."""

from __future__ import annotations

import pytest
import torch

from kvplug.kernels.collect_mass import (
    collect_mass,
    collect_mass_reference,
    forget_mass,
    forget_mass_reference,
)
from tests.kernels.local import NUM_PAGES, Local, Shape, Window, local_of

SHAPES = pytest.mark.parametrize(
    ("page", "heads"), [(16, 1), (32, 3), (64, 2), (128, 1)], ids=["p16", "p32", "p64", "p128"]
)


def state_of(page: int, heads: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass that pages have, and positions that all of them have seen."""
    mass = torch.rand(NUM_PAGES, heads, page, device=device)
    return mass, torch.zeros(NUM_PAGES, heads, dtype=torch.int32, device=device)


def local(page: int, heads: int, made: list[Window], device: str) -> Local:
    return local_of(Shape(page, heads, 2, 64, torch.float32), made, device)


def given_of(windows: int, heads: int, page: int, device: str, pages: int = 5) -> torch.Tensor:
    return torch.rand(windows, heads, pages * page, device=device)


@SHAPES
def test_twin(page: int, heads: int, device: str) -> None:
    """To the bit: sums come in one order. Of several requests, some with windows that overlap."""
    made = [
        Window(2, 0, 2 * page, 0), Window(0, page, 2 * page, 0), Window(1, page, page + 3, 1),
        Window(1, 2 * page + 3, 1, 1), Window(0, 3 * page, 2 * page, 1), Window(1, 0, page, 0),
    ]  # fmt: skip
    it = local(page, heads, made, device)
    given, (mass, seen) = given_of(len(made), heads, page, device), state_of(page, heads, device)
    expected = mass.clone(), seen.clone()
    collect_mass(it.windows, given, mass, seen)
    collect_mass_reference(it.windows, given, *expected)
    assert torch.equal(mass, expected[0])
    assert torch.equal(seen, expected[1])
    ends = [seen[it.pages[request, n], 0].item() for request, n in ((0, 0), (0, 4), (1, 1))]
    assert ends == [3 * page, 5 * page, 2 * page + 4]


@SHAPES
def test_in_steps_of_pages(
    page: int, heads: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [Window(0, 3 * page, 2 * page, 0), Window(0, 5 * page, page, 1)]
    it = local(page, heads, made, device)
    given, state = given_of(2, heads, page, device), state_of(page, heads, device)
    expected = [tensor.clone() for tensor in state]
    collect_mass(it.windows, given, *expected)
    monkeypatch.setattr("kvplug.kernels.collect_mass.BLOCK_C", page * 2)
    collect_mass(it.windows, given, *state)
    assert all(map(torch.equal, state, expected))


def test_windows_at_once_or_one_by_one(device: str) -> None:
    """To the bit."""
    made = [Window(0, 32 * n, 32, max(n - 2, 0)) for n in range(6)]
    it = local(32, 2, made, device)
    given, state = given_of(6, 2, 32, device), state_of(32, 2, device)
    expected = [tensor.clone() for tensor in state]
    collect_mass(it.windows, given, *expected)
    for w in range(6):
        alone = it.windows.span(w, w + 1)
        collect_mass(alone, given[w : w + 1], *state)
    assert all(map(torch.equal, state, expected))


def test_two_requests_that_share_a_page_add_to_it_once(device: str) -> None:
    """Both walk through the same window, in one step or in two; a later window counts again."""
    made = [Window(0, 32, 32, 0), Window(1, 32, 32, 0), Window(1, 64, 32, 1)]
    it = local(32, 1, made, device)
    it.windows.block_table[1, :2] = it.windows.block_table[0, :2]
    given, (mass, seen) = given_of(3, 1, 32, device), state_of(32, 1, device)
    before, shared = mass.clone(), it.pages[0, :2]
    own = it.pages[1, 2]
    collect_mass(it.windows, given, mass, seen)
    window = given[0, 0, :64].view(2, 32)
    assert torch.equal(mass[shared[0], 0], before[shared[0], 0] + window[0])
    both = before[shared[1], 0] + window[1] + given[2, 0, :32]
    assert torch.equal(mass[shared[1], 0], both)
    assert torch.equal(mass[own, 0], before[own, 0] + given[2, 0, 32:64])
    assert seen[shared].flatten().tolist() == [64, 96]
    once = mass.clone()
    collect_mass(it.windows, given, mass, seen)
    assert torch.equal(mass, once)


def test_a_page_that_is_settled_takes_nothing(device: str) -> None:
    it = local(32, 2, [Window(0, 32, 32, 0)], device)
    mass, seen = state_of(32, 2, device)
    seen[it.pages[0, 0]] = 2**31 - 1
    before = mass.clone()
    collect_mass(it.windows, given_of(1, 2, 32, device), mass, seen)
    changed = (mass != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [int(it.pages[0, 1])]


@SHAPES
def test_slots_are_forgotten(page: int, heads: int, device: str) -> None:
    """And a page whose first slot is written has seen nothing; padding is no slot."""
    mass, seen = state_of(page, heads, device)
    mass += 1
    seen.fill_(9)
    slots = torch.tensor([-1, 5 * page + 2, 7 * page, 7 * page + 1, -3], device=device)
    slots = torch.cat([slots, torch.arange(9 * page - 1, 11 * page, device=device)])
    expected = mass.clone(), seen.clone()
    forget_mass(slots, mass, seen)
    forget_mass_reference(slots, *expected)
    assert torch.equal(mass, expected[0])
    assert torch.equal(seen, expected[1])
    cleared = (mass == 0).all(1).flatten().nonzero().flatten().tolist()
    assert cleared == sorted(slots[slots >= 0].tolist())
    assert (seen == 0).all(1).nonzero().flatten().tolist() == [7, 9, 10]


def test_what_cannot_be_read_is_refused(device: str) -> None:
    it = local(32, 1, [Window(0, 32, 32, 0)], device)
    given, (mass, seen) = given_of(1, 1, 32, device), state_of(32, 1, device)
    with pytest.raises(ValueError, match="K must be a multiple of 32, not 40"):
        collect_mass(it.windows, given[:, :, :40].contiguous(), mass, seen)
    with pytest.raises(ValueError, match=r"seen must be int32 \[50, 1\]"):
        collect_mass(it.windows, given, mass, seen.long())
    with pytest.raises(ValueError, match=r"slots must be int64 \[T\]"):
        forget_mass(torch.zeros(3, dtype=torch.int32, device=device), mass, seen)
