"""A paged cache with every page of every KV head as a page of its own, by strides alone.

For kernels that take one row of the page table a sequence: there every (window, KV head) is a
sequence of a cache with a single head. Page ``b`` of head ``h`` is a page of such a cache in any
layout of vLLM's: pages of the view begin at every common divisor of the distances between pages and
between heads, and most of them may overlap.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvplug.errors import KvplugError

if TYPE_CHECKING:
    from kvplug.kernels.paged_attention import PagedCache

MOST_ROWS = 2**31
"""Pages that a table of int32 can name."""


class SingleHeads(NamedTuple):
    """A cache with every (page, KV head) as a page of its own."""

    keys: torch.Tensor
    """``[rows, P, 1, D]``; rows may overlap."""
    values: torch.Tensor
    """``[rows, P, 1, D]``."""
    page_step: int
    """Rows from a page to the next."""
    head_step: int
    """Rows from a head to the next."""

    @classmethod
    def of(cls, cache: PagedCache, unit: int | None = None) -> SingleHeads:
        """Views a cache; no copy.

        Args:
            cache: Keys and values at the same distances.
            unit: Elements from a row to the next, a divisor of the distances between pages and
                between heads. None: their greatest.

        Raises:
            KvplugError: It has more rows than a page table can name.
        """
        pages, page, heads, dim = cache.keys.shape
        by_page, by_token, by_head, _ = cache.keys.stride()
        if heads == 1:
            by_head = 0
        unit = unit or math.gcd(by_page, by_head)
        rows = ((pages - 1) * by_page + (heads - 1) * by_head) // unit + 1
        if rows >= MOST_ROWS:
            raise KvplugError(
                f"A page table of int32 cannot name the {rows} places of this cache: use attend "
                f"'triton'."
            )
        size, strides = (rows, page, 1, dim), (unit, by_token, dim, 1)
        keys, values = (
            side.as_strided(size, strides, side.storage_offset())
            for side in (cache.keys, cache.values)
        )
        return cls(keys, values, by_page // unit, by_head // unit)

    def table(self, pages: torch.Tensor) -> torch.Tensor:
        """``[S, Hk, W]`` int32 rows of ``[S, Hk, W]`` int32 pages."""
        heads = torch.arange(pages.shape[1], dtype=torch.int32, device=pages.device)
        return pages * self.page_step + heads[:, None] * self.head_step
