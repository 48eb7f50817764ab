"""Windows over local pages made by hand, for tests of what learns from them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.local_mass import LocalWindows

NOBODY = 2**30
"""Where a row of the block table ends; to read it would be to read out of bounds."""
NUM_PAGES = 50


class Shape(NamedTuple):
    """Sizes of a layer."""

    page: int
    kv_heads: int
    group: int
    dim: int
    dtype: torch.dtype


class Window(NamedTuple):
    """Of a request: its first position, its tokens, and its first local page."""

    request: int
    first: int
    tokens: int
    page: int


class Local(NamedTuple):
    """Windows and the cache that they look at."""

    windows: LocalWindows
    keys: torch.Tensor
    """``[pages, P, Hk, D]``."""
    pages: torch.Tensor
    """``[requests, N]`` of each request, on the CPU."""


def local_of(shape: Shape, made: list[Window], device: str) -> Local:
    """Windows of up to 3 requests with shuffled pages; keys behind their contexts are NaN."""
    page, heads = shape.page, shape.kv_heads * shape.group
    ends = [max((w.first + w.tokens for w in made if w.request == r), default=0) for r in range(3)]
    width = -(-max(ends) // page)
    order = torch.randperm(NUM_PAGES)[: 3 * width].view(3, width)
    raw = torch.full((NUM_PAGES, shape.kv_heads, page, 2 * shape.dim), torch.nan)
    table = torch.full((3, width + 2), NOBODY, dtype=torch.int32)
    for request, end in enumerate(ends):
        tokens = torch.arange(end)
        raw[order[request, tokens // page], :, tokens % page] = torch.randn(
            end, shape.kv_heads, 2 * shape.dim
        )
        filled = -(-end // page)
        table[request, :filled] = order[request, :filled].int()
    keys = raw.to(device, shape.dtype).transpose(1, 2)[..., : shape.dim]
    total = sum(window.tokens for window in made)
    # Tokens and heads are strided, as they are where queries, keys and values lie side by side.
    queries = torch.randn(total + 1, heads + 2, shape.dim).to(device, shape.dtype)
    starts = [sum(window.tokens for window in made[:w]) for w in range(len(made))]

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    windows = LocalWindows(
        QueryWindows(
            queries[:total, 1 : heads + 1], column(starts), column([w.tokens for w in made])
        ),
        table.to(device)[:, : width + 1],
        column([w.request for w in made]),
        column([w.first + w.tokens for w in made]),
        column([w.page for w in made]),
    )
    return Local(windows, keys, order)
