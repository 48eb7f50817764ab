"""What the stages know of one engine step."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from kvplug.row_counts import RowCounts
    from kvplug.windows import Ints, Windows


class Sealing(NamedTuple):
    """Pages that a step's windows leave behind, ``n`` of them, window by window.

    They are whole, no later query has them in its local region, and none was sealed since it was
    last written to. Valid until the next step is planned.
    """

    pages: Ints
    """``[n]`` physical pages, each once. Within a window they ascend logically."""
    logical: Ints
    """``[n]`` their numbers in the context of the window that seals them."""
    starts: Ints
    """``[S + 1]`` first entry of each window of ``step.windows``, then n."""
    begun: Ints = np.empty(0, np.int32)
    """Rows of the batch whose contexts are retrieved from for the first time since their first page
    was written, each once."""


class Step:
    """One step's windows and the pages behind them; every layer of the step shares it.

    Args:
        windows: The step's ``S`` windows.
        block_table: ``[B, max_pages]`` int32, physical page of each logical page of a request.
        most_pages: Most far pages that a window of the step can select in any layer and head.
        stream: Every window of the step, dense ones included and not merged, with the far pages
            that its place in the request gives it: what memories watch. None where nobody does.
        is_prefilling: ``[B]`` whether a request's prompt was incomplete before this step.
        targets: ``[B]`` recall targets, NaN for the engine's; None where none has its own.
        counts: Takes what each request attended to; None where none wants to know.
    """

    def __init__(
        self,
        windows: Windows,
        block_table: torch.Tensor,
        most_pages: int,
        stream: Windows | None = None,
        is_prefilling: np.ndarray | None = None,
        targets: np.ndarray | None = None,
        counts: RowCounts | None = None,
    ) -> None:
        """Holds its arguments."""
        self.windows = windows
        self.block_table = block_table
        self.most_pages = most_pages
        self._stream = stream
        self._is_prefilling = is_prefilling
        self._targets = targets
        self.counts = counts
        self.sealed: Sealing | None = None
        """Pages that its layers summarise, once the first of them runs."""

    @property
    def stream(self) -> Windows:
        """Every window of the step; see the class."""
        assert self._stream is not None, "no stage of this recipe watches"
        return self._stream

    @cached_property
    def stream_prefills(self) -> np.ndarray:
        """``[S]`` whether a window of the stream is a part of its request's prompt."""
        assert self._is_prefilling is not None
        return self._is_prefilling[self.stream.request]

    def last_queries(self, queries: torch.Tensor, s: int, num_kv_heads: int) -> torch.Tensor:
        """``[Hk, G, D]`` float32: of window ``s``'s last token, from the step's ``[T, H, D]``."""
        last = int(self.windows.token_start[s] + self.windows.num_tokens[s]) - 1
        return queries[last].float().view(num_kv_heads, -1, queries.shape[-1])

    def pages_of(self, s: int, page: int) -> torch.Tensor:
        """``[N]`` int64 physical pages of window ``s``'s context, ``page`` tokens each."""
        count = -(-int(self.windows.context_end[s]) // page)
        return self.block_table[int(self.windows.request[s]), :count].long()

    def target(self, s: int, default: float) -> float:
        """The recall target of window ``s``'s request, or the engine's."""
        if self._targets is None:
            return default
        mine = float(self._targets[self.windows.request[s]])
        return default if np.isnan(mine) else mine

    @cached_property
    def prefills(self) -> np.ndarray:
        """``[S]`` whether a window is a part of its request's prompt."""
        assert self._is_prefilling is not None
        return self._is_prefilling[self.windows.request]

    @cached_property
    def block_table_host(self) -> Ints:
        """``block_table`` as an array over the same memory (host only)."""
        return self.block_table.numpy()

    @cached_property
    def positions(self) -> torch.Tensor:
        """``[T]`` int64 positions of the step's tokens in their contexts."""
        windows = self.windows
        first = windows.context_end - windows.num_tokens - windows.token_start
        shift = np.repeat(first.astype(np.int64), windows.num_tokens)
        return torch.from_numpy(shift + np.arange(len(shift)))

    @cached_property
    def sparse_windows(self) -> Ints:
        """``[W]`` numbers of the windows that select pages."""
        return np.flatnonzero(self.windows.sparse).astype(np.int32)

    @cached_property
    def asked(self) -> torch.Tensor:
        """``[W, 1]`` int32 far pages that each of them selects where budgets do not vary."""
        return torch.from_numpy(self.windows.num_selected[self.sparse_windows, None])

    @cached_property
    def max_far_pages(self) -> int:
        """N: the most retrievable pages that any window of the step has."""
        rows = self.sparse_windows
        return int((self.windows.far_end[rows] - self.windows.far_begin[rows]).max(initial=0))

    @cached_property
    def max_selected(self) -> int:
        """K: the most far pages that any window of the step may select in a layer."""
        return self.most_pages if len(self.sparse_windows) else 0
