"""Settled pages: the twin's to the bit, each once, and what the index on CPU has of the same."""

from __future__ import annotations

import pytest
import torch

from kvplug.index.representative import representatives_reference
from kvplug.kernels.settled_pages import SETTLED, settle_pages, settle_pages_reference
from tests.kernels.far import NUM_PAGES, Windows, windows_of
from tests.steps import Far

DONE = SETTLED.value
SHAPES = pytest.mark.parametrize(
    ("page", "heads", "dim", "dtype"),
    [
        (16, 3, 64, torch.float32),
        (32, 2, 80, torch.float16),
        (64, 1, 128, torch.bfloat16),
        (128, 1, 256, torch.float32),
    ],
    ids=["p16", "p32-d80-fp16", "p64-bf16", "p128-d256"],
)


class Made:
    """A cache of keys with mass, of which pages 3 and 7 are settled."""

    def __init__(self, page: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> None:
        raw = torch.randn(NUM_PAGES, heads, page, 2 * dim).to(device, dtype)
        self.keys = raw.transpose(1, 2)[..., :dim]
        self.mass = torch.randint(0, 6, (NUM_PAGES, heads, page)).float().to(device) / 2
        self.mass[::5] = 0
        self.seen = torch.full((NUM_PAGES, heads), 40, dtype=torch.int32, device=device)
        self.seen[[3, 7]] = DONE
        self.vectors = torch.full(
            (NUM_PAGES, heads, dim), 9.0, dtype=torch.bfloat16, device=device
        )  # fmt: skip
        self.largest = torch.full((NUM_PAGES, heads), 9.0, device=device)

    def settle(self, windows: Windows, top: int = 4, *, twin: bool = False) -> list[torch.Tensor]:
        """Copies of what pages have and have seen."""
        far, out = windows.far, [self.vectors.clone(), self.largest.clone(), self.seen.clone()]
        most = int((far.end - far.begin).max())
        function = settle_pages_reference if twin else settle_pages
        function(self.keys, far, most, self.mass, out[2], out[0], top, out[1])
        return out


def some_windows(device: str) -> Windows:
    """More pages than a program looks at, none, one, and pages of another window again."""
    return windows_of(
        [Far(1, 2, 40), Far(0, 7, 7), Far(0, 5, 6), Far(1, 1, 12)], [1, 1, 1, 1], device
    )


@SHAPES
@pytest.mark.parametrize("top", [1, 4, 200])
def test_twin(
    page: int, heads: int, dim: int, dtype: torch.dtype, top: int, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """To the bit; other pages and those that are settled stay as they are."""
    monkeypatch.setattr("kvplug.kernels.settled_pages.BLOCK_N", 16)
    it, windows = Made(page, heads, dim, dtype, device), some_windows(device)
    found, expected = it.settle(windows, top), it.settle(windows, top, twin=True)
    assert all(map(torch.equal, found, expected))
    pages = torch.cat([windows.far.pages(w) for w in range(4)]).unique()
    fresh = set(pages.tolist()) - {3, 7}
    assert set((found[2] == DONE).all(1).nonzero().flatten().tolist()) == fresh | {3, 7}
    assert (found[1] != 9).all(1).nonzero().flatten().tolist() == sorted(fresh)


@SHAPES
def test_representatives_are_those_of_the_index_on_cpu(
    page: int, heads: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    it, windows = Made(page, heads, dim, dtype, device), some_windows(device)
    found = it.settle(windows)
    pages = torch.tensor([n for n in windows.far.pages(0).tolist() if n not in (3, 7)])
    wanted = representatives_reference(it.keys.cpu()[pages], it.mass.cpu()[pages], 4)
    error = (found[0].cpu()[pages].float() - wanted).abs()
    assert (error <= wanted.abs() * torch.finfo(torch.bfloat16).eps / 2 + 1e-6).all()
    assert torch.equal(found[1].cpu()[pages], it.mass.cpu()[pages].amax(-1))


def test_settling_again_changes_nothing(device: str) -> None:
    """Whatever mass a page has by then."""
    it, windows = Made(16, 2, 64, torch.float32, device), some_windows(device)
    it.vectors, it.largest, it.seen = it.settle(windows)
    it.mass += torch.rand_like(it.mass)
    assert all(map(torch.equal, it.settle(windows), (it.vectors, it.largest, it.seen)))


def test_one_of_the_two(device: str) -> None:
    it, windows = Made(16, 2, 64, torch.float32, device), some_windows(device)
    both = it.settle(windows)
    seen = it.seen.clone()
    settle_pages(it.keys, windows.far, 38, it.mass, seen, it.vectors, 4)
    assert torch.equal(it.vectors, both[0])
    settle_pages(it.keys, windows.far, 38, it.mass, it.seen, largest=it.largest)
    assert torch.equal(it.largest, both[1])
    assert torch.equal(it.seen, seen)


def test_keys_that_are_no_numbers(device: str) -> None:
    """They count where they are chosen."""
    it, windows = Made(16, 1, 64, torch.float32, device), some_windows(device)
    page = next(n for n in windows.far.pages(0).tolist() if n % 5 and n not in (3, 7))
    it.keys[page, 3] = torch.nan
    it.mass[page] = 0
    it.mass[page, 0, 5] = 1
    assert it.settle(windows, 1)[0][page].isfinite().all()
    it.mass[page, 0, 3] = 2
    assert it.settle(windows, 1)[0][page].isnan().all()


def test_what_cannot_be_read_is_refused(device: str) -> None:
    it, windows = Made(16, 1, 64, torch.float32, device), some_windows(device)
    state = it.mass, it.seen
    with pytest.raises(ValueError, match="needs vectors or largest"):
        settle_pages(it.keys, windows.far, 38, *state)
    with pytest.raises(ValueError, match="needs top >= 1, not 0"):
        settle_pages(it.keys, windows.far, 38, *state, it.vectors, 0)
    with pytest.raises(ValueError, match=r"vectors must be bfloat16 \[50, 1, 64\]"):
        settle_pages(it.keys, windows.far, 38, *state, it.vectors.float())
