"""Regions found on the device are those that windows of one token are cut into on CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvplug.kernels.decode_regions import Regions, decode_regions, decode_regions_reference
from kvplug.pages import PageGeometry
from kvplug.windows import cut_windows

SIZES = pytest.mark.parametrize(
    "regions",
    [
        Regions(16, 2, 48, 3, 200),
        Regions(32, 0, 1, 0, 0),
        Regions(64, 3, 100, 1, 0),
        Regions(128, 1, 200, 2, 900),
    ],
    ids=["page16", "nothing-kept", "no-dense-contexts", "page128"],
)
LENGTHS = torch.arange(1201, dtype=torch.int32)


def columns(device: str) -> list[torch.Tensor]:
    return [torch.empty(len(LENGTHS), dtype=torch.int32, device=device) for _ in range(3)]


@SIZES
def test_every_length_has_the_regions_of_its_window(regions: Regions, device: str) -> None:
    begin, end, counts = found = columns(device)
    decode_regions(LENGTHS.to(device), regions, 3, *found)
    page, sinks, local, budget, dense_below = regions
    geometry = PageGeometry(page, page, sinks, local, budget, dense_below, budget)
    windows = cut_windows(
        np.arange(len(LENGTHS), dtype=np.int32), LENGTHS[1:].numpy(),
        np.zeros(len(LENGTHS) - 1, np.bool_), geometry,
    )  # fmt: skip
    assert np.array_equal(begin[1:].cpu().numpy(), windows.far_begin)
    assert np.array_equal(end[1:].cpu().numpy(), windows.far_end)
    assert np.array_equal(counts[1:].cpu().numpy(), 3 * windows.sparse)
    assert 0 < windows.sparse.sum() < len(windows)
    assert (begin[0], end[0], counts[0]) == (0, 0, 0)


@SIZES
def test_twin(regions: Regions, device: str) -> None:
    found, expected = columns(device), columns(device)
    decode_regions(LENGTHS.to(device), regions, 8, *found)
    decode_regions_reference(LENGTHS.to(device), regions, 8, *expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@SIZES
def test_no_row_is_wider_than_the_regions_say(regions: Regions, device: str) -> None:
    """And one is as wide, so that no memory is taken for nothing."""
    begin, end, _ = found = columns(device)
    decode_regions(LENGTHS.to(device), regions, 1, *found)
    pages = (LENGTHS + regions.page - 1) // regions.page
    far = (end - begin).cpu()
    width = pages - far + far.clamp(max=regions.budget_pages)
    assert width.max() == regions.row_pages()
    assert (far <= torch.tensor([regions.far_pages(n) for n in LENGTHS.tolist()])).all()


def test_wrong_sizes_are_refused(device: str) -> None:
    found = columns(device)
    lengths = LENGTHS.to(device)
    with pytest.raises(ValueError, match="local >= 1"):
        decode_regions(lengths, Regions(16, 1, 0, 1, 0), 1, *found)
    with pytest.raises(ValueError, match="Page size must be one of"):
        decode_regions(lengths, Regions(24, 1, 1, 1, 0), 1, *found)
    with pytest.raises(ValueError, match=r"lengths must be int32 \[B\]"):
        decode_regions(lengths.long(), Regions(16, 1, 1, 1, 0), 1, *found)
