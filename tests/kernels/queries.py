"""Windows of queries made by hand, for tests of what makes probes of them."""

from __future__ import annotations

import torch

from kvplug.kernels.distance import QueryWindows


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
