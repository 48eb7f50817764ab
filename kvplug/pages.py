"""Page geometry: how pages of one KV head are addressed, and where a context's regions lie.

``P`` is the number of tokens per page (vLLM's kernel block), ``Hk`` the number of KV heads,
``D`` the head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kvplug.errors import KvplugError

if TYPE_CHECKING:
    from kvplug.config import KvplugConfig


class PageGeometry(NamedTuple):
    """Region sizes in the units that the per-step code works with."""

    page: int
    """Tokens per page, P."""
    window: int
    """Query tokens per window; a multiple of ``page``."""
    sink_pages: int
    """Pages at the start of a context that are always attended."""
    local: int
    """Tokens before a window's first query (itself included) that are always attended."""
    budget_pages: int
    """Far pages attended per window and KV head."""
    dense_below: int
    """Windows whose context ends at or before this token attend to everything."""
    most_pages: int
    """Most far pages that a row can hold; ``budget_pages`` unless budgets vary."""

    @classmethod
    def of(
        cls, config: KvplugConfig, page: int, budget_pages: int, most_pages: int | None = None
    ) -> PageGeometry:
        """Geometry for pages of ``page`` tokens.

        Args:
            config: The user's options.
            page: P.
            budget_pages: Far pages of a window.
            most_pages: Far pages that a window can have in one layer, where budgets vary.

        Raises:
            KvplugError: Window or budget does not fit the page.
        """
        config.check_page(page)
        return cls(
            page=page,
            window=config.window,
            sink_pages=-(-config.sink // page),
            local=config.local,
            budget_pages=budget_pages,
            dense_below=config.dense_below,
            most_pages=budget_pages if most_pages is None else most_pages,
        )

    def max_pages_per_row(self) -> int:
        """Widest page-table row that a window can need; it does not grow with the context.

        A window goes through its own table row either because it is sparse (sinks, budget, local)
        or because it is dense and rides along: then its far pages fit the budget, or its whole
        context ends before ``dense_below``.
        """
        local_pages = -(-(self.local + self.window) // self.page) + 1
        dense_pages = -(-self.dense_below // self.page) + 1
        return max(self.sink_pages + self.most_pages + local_pages, dense_pages)


def single_head_view(kv_cache: torch.Tensor) -> torch.Tensor:
    """Views a head-major cache so that one page of one KV head is a page of its own.

    Page ``b`` of head ``h`` becomes row ``b * Hk + h``.

    Args:
        kv_cache: ``[pages, Hk, P, 2 * D]``, contiguous: the layout of vLLM's CPU backend.

    Returns:
        The same memory as ``[pages * Hk, 1, P, 2 * D]``.

    Raises:
        KvplugError: The cache is laid out in another way.
    """
    if kv_cache.dim() != 4 or not kv_cache.is_contiguous():
        raise KvplugError(
            f"kvplug needs a contiguous head-major KV cache [pages, heads, tokens, 2 * dim]; this "
            f"one has shape {tuple(kv_cache.shape)} and strides {kv_cache.stride()}."
        )
    pages, heads, page, width = kv_cache.shape
    return kv_cache.view(pages * heads, 1, page, width)


def sparse_context(geometry: PageGeometry) -> int:
    """A context, in whole windows, whose last window is sparse."""
    tokens = geometry.dense_below + geometry.local + 2 * geometry.window
    tokens += (geometry.sink_pages + geometry.most_pages + 1) * geometry.page
    return -(-tokens // geometry.window) * geometry.window
