"""Prefix sums of keys around windows, which refinement compares runs of tokens by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import prange

from kvplug.compiled import compiled

if TYPE_CHECKING:
    from kvplug.page_reader import PageReader
    from kvplug.segment.prompts import Prompts
    from kvplug.windows import Ints
    from kvplug.workspace import Workspace


class KeySums:
    """Reads keys back from the cache and sums them up.

    Args:
        reader: Of one layer.
        num_kv_heads: Hk.
        page: P.
        workspace: Owns the result.
    """

    def __init__(
        self, reader: PageReader, num_kv_heads: int, page: int, workspace: Workspace
    ) -> None:
        """Holds its arguments."""
        self._reader = reader
        self._heads = num_kv_heads
        self._page = page
        self._workspace = workspace

    def around(self, prompts: Prompts, reach: int, block_table: Ints) -> tuple[torch.Tensor, Ints]:
        """Sums for each window, from ``reach`` tokens before it to its end.

        Args:
            prompts: The windows.
            reach: In whole pages.
            block_table: ``[B, max_pages]``.

        Returns:
            ``[n, m + 1, Hk * D]`` float64, entry ``t`` the sum of the first t tokens' keys, head
            by head; and ``[n]`` the position of each window's first summed token.
        """
        begin = np.maximum(prompts.first - reach, 0) // self._page
        count = -(-(prompts.first + prompts.tokens) // self._page) - begin
        window = np.repeat(np.arange(len(count)), count)
        starts = np.cumsum(count) - count
        logical = np.arange(len(window)) - starts[window] + begin[window]
        physical = block_table[prompts.request[window], logical].astype(np.int64)
        rows = physical[:, None] * self._heads + np.arange(self._heads)
        keys = self._reader.read(torch.from_numpy(rows.reshape(-1)), self._workspace)
        shape = (len(count), int(count.max()) * self._page + 1, self._heads * keys.shape[1])
        sums = self._workspace.take("segment.sums", shape, torch.float64)
        _sum_keys(keys.numel(), keys.numpy(), self._heads, starts, count, sums.numpy())
        return sums, (begin * self._page).astype(np.int32)


@compiled()
def _sum_keys(keys, heads, starts, count, sums):  # type: ignore[no-untyped-def]
    """Prefix sums over the tokens of each window's pages.

    Args:
        keys: ``[pages * Hk, D, P]`` float32.
        heads: Hk.
        starts: ``[n]`` first page of each window.
        count: ``[n]`` its pages.
        sums: ``[n, m + 1, Hk * D]``, written up to the window's own length.
    """
    dim, page = keys.shape[1:]
    for task in prange(count.shape[0] * heads):
        w, head = task // heads, task % heads
        for d in range(dim):
            total = 0.0
            sums[w, 0, head * dim + d] = 0.0
            for n in range(count[w]):
                row = (starts[w] + n) * heads + head
                for t in range(page):
                    total += keys[row, d, t]
                    sums[w, n * page + t + 1, head * dim + d] = total
