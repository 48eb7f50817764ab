"""Channels and codes made by hand, for tests of what reads them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tests.kernels.far import NUM_PAGES


class Channels(NamedTuple):
    """Of every page, as if a context began at each."""

    chosen: torch.Tensor
    """``[pages, Hk, C]`` int16."""
    scales: torch.Tensor
    """``[pages, Hk, 2, C]`` float32."""


def some_channels(heads: int, dim: int, channels: int, device: str) -> Channels:
    """In disorder, with means around 0 and deviations around 1."""
    chosen = torch.rand(NUM_PAGES, heads, dim).argsort(-1)[..., :channels].short()
    scales = torch.randn(NUM_PAGES, heads, 2, channels) / 4
    scales[:, :, 1] = 1 + scales[:, :, 1].abs()
    return Channels(chosen.to(device), scales.to(device))
