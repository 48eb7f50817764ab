"""Page mass: the largest of a page's tokens, written down when the page leaves the local region."""

from __future__ import annotations

import torch

from kvplug.index.local_mass import LocalMass
from kvplug.index.page_mass import PageMass, page_mass_reference
from kvplug.pages import PageGeometry
from kvplug.stage import Layer
from tests.caches import KeyCache
from tests.made_up import Piece, layer_shape
from tests.streams import slots_of, stream_of

PAGE, WINDOW, KV_HEADS, PAGES = 8, 16, 3, 40
GEOMETRY = PageGeometry(PAGE, WINDOW, 2, 20, 2, 0, 2)


def made() -> tuple[PageMass, LocalMass, KeyCache]:
    """A layer's page mass, all of it stale, the local mass that it reads, and their cache."""
    shape = layer_shape(num_pages=PAGES, page=PAGE, num_kv_heads=KV_HEADS)
    cache = KeyCache(shape)
    layer = Layer(shape, {}, cache.reader())
    memory, local = layer.own(PageMass), layer.own(LocalMass)
    memory.mass.fill_(-1)
    return memory, local, cache


def see(memory: PageMass, cache: KeyCache, piece: Piece, table: torch.Tensor) -> None:
    """One step of one request, whose content does not matter."""
    cache.seals.reset(slots_of(GEOMETRY, [piece], table).numpy(), PAGE)
    cache.seal(stream_of(GEOMETRY, [piece], table), memory)


def test_twin() -> None:
    """Far pages without the sinks: of a last window at 112, those before page (113 - 20) // 8."""
    memory, local, cache = made()
    local.mass.copy_(torch.rand(local.mass.shape))
    table = torch.randperm(PAGES).to(torch.int32)[None]
    see(memory, cache, Piece(0, 0, 128, True), table)
    sealed = table[0, 2:11].tolist()
    expected = page_mass_reference(local.mass, sealed)
    assert {page: memory.mass[page].tolist() for page in sealed} == {
        page: mass.tolist() for page, mass in expected.items()
    }
    rest = [page for page in range(PAGES) if page not in sealed]
    assert (memory.mass[rest] == -1).all()


def test_what_comes_later_changes_nothing_until_the_page_is_handed_on() -> None:
    memory, local, cache = made()
    table = torch.randperm(PAGES).to(torch.int32)[None]
    page = int(table[0, 5])
    local.mass[page] = torch.rand(KV_HEADS, PAGE)
    see(memory, cache, Piece(0, 0, 96, True), table)
    before = memory.mass[page].clone()
    assert torch.equal(before, local.mass[page].amax(-1))
    local.mass[page] = 9
    see(memory, cache, Piece(0, 96, 32, True), table)
    see(memory, cache, Piece(0, 128, 1, False), table)
    assert torch.equal(memory.mass[page], before)
    see(memory, cache, Piece(0, 0, 96, True), table)  # the page's slots are written again
    assert (memory.mass[page] == 9).all()
