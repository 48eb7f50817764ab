"""Windows of queries made by hand, for tests of what makes probes of them."""

from __future__ import annotations

import torch

from kvplug.kernels.distance import QueryWindows
from tests.kernels.far import NOBODY


def query_windows(
    counts: list[int], heads: int, dim: int, dtype: torch.dtype, device: str
) -> QueryWindows:
    """Windows of these many tokens, one behind the other, some tokens standing out.

    Tokens are strided, as they are where queries, keys and values lie side by side.
    """
    total = sum(counts)
    queries = torch.randn(total + 1, heads + 2, dim)
    queries[::7] *= 3
    starts = [sum(counts[:s]) for s in range(len(counts))]
    column = torch.tensor([starts, counts], dtype=torch.int32, device=device)
    return QueryWindows(queries.to(device, dtype)[:total, 1 : heads + 1], column[0], column[1])


def logical_pages(physical: list[int], num_pages: int, device: str) -> torch.Tensor:
    """``[n]`` int32: what :func:`carried_by`'s table calls these pages; negative ones stay."""
    order = _order(num_pages)
    logical = [order.index(page) if page >= 0 else page for page in physical]
    return torch.tensor(logical, dtype=torch.int32, device=device)


def carried_by(
    physical: list[int], num_pages: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block table, requests and logical pages of windows that find what is on these pages.

    Rows of the table are strided; the first one, of a request that has no window, leads nowhere.
    """
    table = torch.full((2, num_pages + 5), NOBODY, dtype=torch.int32)
    table[1, :num_pages] = torch.tensor(_order(num_pages))
    request = torch.ones(len(physical), dtype=torch.int32, device=device)
    logical = logical_pages(physical, num_pages, device)
    return table.to(device)[:, :num_pages], request, logical


def _order(num_pages: int) -> list[int]:
    """Pages in disorder."""
    return [(5 * n + 3) % num_pages for n in range(num_pages)]
