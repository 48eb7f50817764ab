"""Summaries of pages: bounds are the tightest that bfloat16 has, means as near as it can be."""

from __future__ import annotations

import pytest
import torch

from kvplug.index.minmax import MinMaxIndex
from kvplug.kernels.page_statistics import (
    filled_page_statistics,
    filled_page_statistics_reference,
    page_statistics,
    page_statistics_reference,
)
from kvplug.stage import Layer
from tests.caches import KeyCache, fill
from tests.made_up import layer_shape

SHAPES = pytest.mark.parametrize(
    ("page", "heads", "dim", "dtype"),
    [
        (16, 1, 64, torch.float32),
        (32, 3, 80, torch.float32),
        (64, 2, 96, torch.float16),
        (128, 2, 128, torch.bfloat16),
        (16, 1, 256, torch.float32),
    ],
    ids=["page16", "page32-d80", "page64-d96-fp16", "page128-bf16", "d256"],
)
PAGES = [4, -1, 0, 6, -1]
"""Of 7 pages those that are complete, and padding."""


def keys_of(page: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """``[7, P, Hk, D]``, beside values and head by head as caches have it."""
    cache = torch.randn(7, heads, page, 2 * dim).to(device, dtype)
    return cache[..., :dim].transpose(1, 2)


@SHAPES
@pytest.mark.parametrize("which", ["means", "bounds", "both"])
def test_twin(page: int, heads: int, dim: int, dtype: torch.dtype, which: str, device: str) -> None:
    """Bounds to the bit; of means the rounding to bfloat16 hides all but ties of rounding."""
    keys = keys_of(page, heads, dim, dtype, device)
    pages = torch.tensor(PAGES, device=device, dtype=torch.int32 if page == 16 else torch.int64)
    found, expected = (
        (
            torch.zeros(7, heads, dim, dtype=torch.bfloat16, device=device),
            torch.zeros(7, heads, 2, dim, dtype=torch.bfloat16, device=device),
        )
        for _ in range(2)
    )
    chosen = slice(0 if which != "bounds" else 1, 2 if which != "means" else 1)
    names = ["means", "bounds"][chosen]
    page_statistics(keys, pages, **dict(zip(names, found[chosen], strict=True)))
    page_statistics_reference(keys, pages, **dict(zip(names, expected[chosen], strict=True)))
    assert torch.equal(found[1], expected[1])
    exact = keys.double().mean(1)
    exact[[1, 2, 3, 5]] = 0
    if which != "bounds":
        error, plain = ((x[0].double() - exact).abs().max() for x in (found, expected))
        # Both round the mean to 8 bits, where float32 may fall on the other side of a tie.
        assert error <= 2 * plain
        assert torch.equal(found[0].abs().sum((1, 2)) > 0, exact.abs().sum((1, 2)) > 0)
    else:
        assert (found[0] == 0).all()


@SHAPES
@pytest.mark.parametrize("which", ["means", "bounds"])
def test_slots_name_the_pages_that_they_fill(
    page: int, heads: int, dim: int, dtype: torch.dtype, which: str, device: str
) -> None:
    """Those whose last slot is new, wherever the others came from; padding names none."""
    keys = keys_of(page, heads, dim, dtype, device)
    slots = torch.cat([
        torch.arange(page - 1, 3 * page - 2),  # the last of page 0, page 1, and page 2 but one slot
        torch.tensor([-1, 6 * page - 1, 4 * page, -1, -page]),  # the last of page 5
    ]).to(device)  # fmt: skip
    sides = () if which == "means" else (2,)
    found, twin, expected = (
        torch.full((7, heads, *sides, dim), 9.0, dtype=torch.bfloat16, device=device)
        for _ in range(3)
    )
    filled_page_statistics(keys, slots, **{which: found})
    filled_page_statistics_reference(keys, slots, **{which: twin})
    page_statistics(keys, torch.tensor([0, 1, 5], device=device), **{which: expected})
    assert torch.equal(found, expected)
    untouched = (twin == 9).flatten(1).all(1).tolist()
    assert untouched == [False, False, True, True, True, False, True]
    if which == "bounds":
        assert torch.equal(twin, expected)


def test_bounds_are_bounds(device: str) -> None:
    keys = keys_of(32, 2, 64, torch.float32, device)
    bounds = torch.empty(7, 2, 2, 64, dtype=torch.bfloat16, device=device)
    page_statistics(keys, torch.arange(7, device=device), bounds=bounds)
    assert (bounds[:, None, :, 0].float() <= keys).all()
    assert (bounds[:, None, :, 1].float() >= keys).all()
    assert (bounds[:, None, :, 0].float() < keys.amin(1)[:, None]).float().mean() > 0.9


def test_bounds_of_what_bfloat16_knows_are_exact(device: str) -> None:
    """Zeros, infinities and numbers of 8 bits, of either sign."""
    values = [0.0, -0.0, 1.5, -1.5, 2.0**-126, -(2.0**-126), torch.inf, -torch.inf]
    keys = torch.tensor(values, device=device).repeat(8)[None, None, None].expand(1, 16, 1, 64)
    bounds = torch.empty(1, 1, 2, 64, dtype=torch.bfloat16, device=device)
    means = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
    page_statistics(keys, torch.zeros(1, dtype=torch.int32, device=device), means, bounds)
    assert torch.equal(bounds[0, 0].float(), keys[0, 0].expand(2, -1))
    assert torch.equal(means[0].float(), keys[0, 0])


def test_means_are_rounded_to_nearest_and_ties_to_even(device: str) -> None:
    """1 + 2^-8 is half way between two bfloat16 and stays at 1; 1 + 3 * 2^-8 goes up."""
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, torch.nan])
    keys = values.repeat(16).to(device)[None, None, None].expand(1, 16, 1, 64)
    means = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
    page_statistics(keys, torch.zeros(1, dtype=torch.int32, device=device), means)
    expected = torch.tensor([1, 1 + 2.0**-6, 1 + 2.0**-7]).repeat(16)
    assert torch.equal(means[0, 0].float().cpu().view(16, 4)[:, :3].flatten(), expected)
    assert means[0, 0, 3::4].isnan().all()


def test_a_mean_is_nan_whatever_bits_its_nan_has(device: str) -> None:
    """NVIDIA's has all of them set, which rounding would carry over into the sign."""
    bits = torch.full((1, 16, 1, 64), 0x7FFFFFFF, dtype=torch.int32, device=device)
    means = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=device)
    page_statistics(bits.view(torch.float32), torch.zeros_like(bits[0, :1, 0, 0]), means)
    assert means.isnan().all()


def test_bounds_are_those_of_the_index_on_cpu(device: str) -> None:
    shape = layer_shape(num_pages=7, page=16, head_dim=64)
    index = MinMaxIndex(Layer(shape, {}, KeyCache(shape).reader()))
    keys = torch.randn(7, 16, 3, 64)
    fill(index, keys.flatten(0, 1), torch.arange(7))
    bounds = torch.empty(7, 3, 2, 64, dtype=torch.bfloat16, device=device)
    page_statistics(keys.to(device), torch.arange(7, device=device), bounds=bounds)
    assert torch.equal(bounds.cpu(), index.bounds)


def test_what_cannot_be_written_is_refused() -> None:
    keys, pages = torch.zeros(2, 16, 1, 64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs means or bounds"):
        page_statistics(keys, pages)
    with pytest.raises(ValueError, match=r"means must be bfloat16 \[2, 1, 64\]"):
        page_statistics(keys, pages, torch.zeros(2, 1, 64))
    with pytest.raises(ValueError, match=r"bounds must be bfloat16 \[2, 1, 2, 64\]"):
        page_statistics(keys, pages, bounds=torch.zeros(2, 2, 1, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="Page size must be one of"):
        page_statistics(torch.zeros(2, 8, 1, 64), pages, torch.zeros(2, 1, 64))
    with pytest.raises(ValueError, match=r"slots must be int64 \[T\]"):
        filled_page_statistics(keys, pages.int(), torch.zeros(2, 1, 64))
