"""bfloat16 in numba: torch's own rounding, for every kind of number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from kvplug.numeric import dot_bfloat16, from_bfloat16, to_bfloat16


@njit
def _convert(values, bits, back):
    for i in range(values.shape[0]):
        bits[i] = to_bfloat16(values[i])
        back[i] = from_bfloat16(bits[i])


def test_bfloat16_is_torchs() -> None:
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, 50_000, dtype=np.uint32)
    # Ties, both ways, and the numbers around them; the largest floats, which round to infinity.
    high = generator.integers(0, 2**16, 2000, dtype=np.uint32) << np.uint32(16)
    ties = [high | np.uint32(low) for low in (0x7FFF, 0x8000, 0x8001, 0)]
    extremes = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 1], np.uint32)
    values = np.concatenate([words, *ties, extremes]).view(np.float32)
    bits, back = np.empty(len(values), np.uint16), np.empty(len(values), np.float32)
    _convert(values, bits, back)
    expected = torch.from_numpy(values).bfloat16()
    number = ~np.isnan(values)
    assert np.array_equal(back[number], expected.float().numpy()[number])
    assert np.array_equal(bits[number], expected.view(torch.int16).numpy().view(np.uint16)[number])
    assert np.isnan(back[~number]).all()


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 80, 128, 256])
def test_dot_product(dim: int) -> None:
    """Small integers exactly; other numbers to the rounding of the sum in any order."""
    vector, other = torch.randint(-9, 10, (2, dim)).float()
    bits = other.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert dot_bfloat16(vector.numpy(), bits) == (vector @ other).item()
    vector, other = torch.randn(dim), torch.randn(dim).bfloat16()
    bits = other.view(torch.int16).numpy().view(np.uint16)
    products = vector.double() * other.double()
    bound = dim * torch.finfo(torch.float32).eps * products.abs().sum().item()
    assert abs(dot_bfloat16(vector.numpy(), bits) - products.sum().item()) <= bound
