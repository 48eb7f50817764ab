"""Paged caches and rows made by hand, for tests of what attends to them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.paged_attention import PagedCache
from tests.kernels.queries import query_windows

SPARE = 5
"""Pages that no row has."""


class Shape(NamedTuple):
    """Sizes of a layer, and what it is stored in."""

    page: int
    kv_heads: int
    group: int
    dim: int
    dtype: torch.dtype


class Attended(NamedTuple):
    """Arguments of attention."""

    windows: QueryWindows
    rows: PageRows
    cache: PagedCache


def attended(shape: Shape, windows: list[tuple[int, int]], device: str) -> Attended:
    """Windows of so many query tokens, whose rows have so many tokens, every head another few less.

    Pages are shuffled. What no row attends to, behind its tokens too, is NaN, and so is what an
    entry behind its pages names. Keys and values lie as in vLLM's cache.
    """
    counts, lengths = [], []
    for count, length in windows:
        counts.append(count)
        lengths += [max(length - head, min(length, count)) for head in range(shape.kv_heads)]
    num_pages = [-(-length // shape.page) for length in lengths]
    shuffled = torch.randperm(sum(num_pages) + SPARE)
    heads = torch.arange(shape.kv_heads)
    raw = torch.full((len(shuffled), shape.kv_heads, shape.page, 2 * shape.dim), torch.nan)
    table = torch.full((len(lengths), max(num_pages) + 1), int(shuffled[-1]), dtype=torch.int32)
    used = 0
    for row, (pages, length) in enumerate(zip(num_pages, lengths, strict=True)):
        mine = shuffled[used : used + pages]
        used += pages
        table[row, :pages] = mine.int()
        tokens = torch.arange(length)
        head = heads[row % shape.kv_heads]
        made = torch.randn(length, 2 * shape.dim)
        raw[mine[tokens // shape.page], head, tokens % shape.page] = made
    cache = raw.to(device, shape.dtype).transpose(1, 2).split(shape.dim, -1)
    queries = query_windows(counts, shape.kv_heads * shape.group, shape.dim, shape.dtype, device)
    rows = PageRows(table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device))
    return Attended(queries, rows, PagedCache(*cache))
