"""Page mass: the largest of a page's tokens, written down when the page leaves the local region."""

from __future__ import annotations

import torch

from kvplug.index.local_mass import LocalMass
from kvplug.index.page_mass import PageMass, page_mass_reference
from kvplug.pages import PageGeometry
from tests.made_up import HEAD_DIM, Piece, layer_of
from tests.streams import watched

PAGE, WINDOW, KV_HEADS, PAGES = 8, 16, 3, 40
GEOMETRY = PageGeometry(PAGE, WINDOW, 2, 20, 2, 0, 2)


def made() -> tuple[PageMass, LocalMass]:
    """A layer's page mass, all of it stale, and the local mass that it reads."""
    layer = layer_of(torch.zeros(PAGES * KV_HEADS, 1, PAGE, HEAD_DIM))
    memory, local = layer.own(PageMass), layer.own(LocalMass)
    memory.mass.fill_(-1)
    return memory, local


def see(memory: PageMass, piece: Piece, table: torch.Tensor) -> None:
    """One step of one request, whose content does not matter."""
    zeros = torch.zeros(400, 6, HEAD_DIM)
    watched([memory], GEOMETRY, [piece], table, [zeros], [zeros[:, :KV_HEADS].contiguous()])


def test_twin() -> None:
    """Far pages without the sinks: of a last window at 112, those before page (113 - 20) // 8."""
    memory, local = made()
    local.mass.copy_(torch.rand(local.mass.shape))
    table = torch.randperm(PAGES).to(torch.int32)[None]
    see(memory, Piece(0, 0, 128, True), table)
    sealed = table[0, 2:11].tolist()
    expected = page_mass_reference(local.mass, sealed)
    assert {page: memory.mass[page].tolist() for page in sealed} == {
        page: mass.tolist() for page, mass in expected.items()
    }
    rest = [page for page in range(PAGES) if page not in sealed]
    assert (memory.mass[rest] == -1).all()


def test_what_comes_later_changes_nothing_until_the_page_is_handed_on() -> None:
    memory, local = made()
    table = torch.randperm(PAGES).to(torch.int32)[None]
    page = int(table[0, 5])
    local.mass[page] = torch.rand(KV_HEADS, PAGE)
    see(memory, Piece(0, 0, 96, True), table)
    before = memory.mass[page].clone()
    assert torch.equal(before, local.mass[page].amax(-1))
    local.mass[page] = 9
    see(memory, Piece(0, 96, 32, True), table)
    see(memory, Piece(0, 128, 1, False), table)
    assert torch.equal(memory.mass[page], before)
    see(memory, Piece(0, 0, 96, True), table)  # the page's slots are written again
    assert (memory.mass[page] == 9).all()
