"""Attention over rows of single heads' pages by kvplug's own Triton kernel.

It reads vLLM's cache in any layout, by strides, and takes the page table of every KV head as it is:
no view of single heads is needed. Windows of one token are cut into parts by the width of a row,
which no batch changes, so a request gets the same answer alone and in a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.page_rows import PageRows
from kvplug.kernels.paged_attention import PagedCache, Parts, paged_attention, parts_of

if TYPE_CHECKING:
    from kvplug.attention.device.plan import SparseWindows


def cache_of(kv_cache: torch.Tensor) -> PagedCache:
    """Keys and values of vLLM's cache ``[pages, Hk, P, 2 * D]``, head-major or token-major."""
    keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return PagedCache(keys, values)


class TritonAttend:
    """Attends to selected pages, the same for every layer of a group.

    Args:
        window: Query tokens of a window.
        scale: Of the dot products.
        cap: Of the logits, 0 for none.
    """

    def __init__(self, window: int, scale: float, cap: float) -> None:
        """Holds its arguments."""
        self.window, self.scale, self.cap = window, scale, cap

    def __call__(
        self, queries: torch.Tensor, output: torch.Tensor, cache: PagedCache,
        windows: SparseWindows, rows: PageRows,
    ) -> None:  # fmt: skip
        """Attends every window to its rows; other tokens' outputs are left alone.

        Args:
            queries: ``[T, H, D]`` of the whole step.
            output: ``[T, H, D]``, written at the windows' tokens.
            cache: The layer's keys and values.
            windows: Those of one token first.
            rows: ``S * Hk`` of them.
        """
        split = windows.singles * cache.keys.shape[2]
        if windows.singles:
            mine = PageRows(rows.table[:split], rows.lengths[:split])
            self._attend_singles(queries, output, cache, windows, mine)
        if windows.singles < len(windows):
            several = windows.span(windows.singles, len(windows))
            theirs = PageRows(rows.table[split:], rows.lengths[split:])
            asking = QueryWindows(queries, several.token_start, several.num_tokens)
            paged_attention(asking, theirs, cache, self.scale, self.window, output, cap=self.cap)

    def _attend_singles(
        self, queries: torch.Tensor, output: torch.Tensor, cache: PagedCache,
        windows: SparseWindows, rows: PageRows,
    ) -> None:  # fmt: skip
        """Windows of one token, their rows in parts."""
        count, is_all = windows.singles, windows.singles == len(queries)
        tokens, ones = windows.token_start[:count], windows.num_tokens[:count]
        mine = queries if is_all else queries.index_select(0, tokens)
        out = output if is_all else torch.empty_like(mine)
        num_parts = parts_of(rows, cache.keys.shape[1])
        parts = Parts(
            queries.new_empty((num_parts, *mine.shape), dtype=torch.float32),
            queries.new_empty((num_parts, *mine.shape[:2]), dtype=torch.float32),
        )
        numbers = tokens
        if not is_all:
            numbers = torch.arange(count, dtype=torch.int32, device=queries.device)
        asking = QueryWindows(mine, numbers, ones)
        paged_attention(asking, rows, cache, self.scale, 1, out, parts=parts, cap=self.cap)
        if not is_all:
            output.index_copy_(0, tokens.long(), out)
