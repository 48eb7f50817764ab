"""What a pipeline counts while it serves: plain numbers, since it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from numba import njit

if TYPE_CHECKING:
    from kvplug.windows import Windows


@dataclass
class SelectionCounts:
    """Counts of one pipeline."""

    dense_tokens: int = 0
    """Query tokens that attended to everything."""
    sparse_tokens: int = 0
    """Query tokens of windows that selected pages."""
    sparse_windows: int = 0
    pages_attended: int = 0
    """By sparse windows, sinks and local pages included, for each KV head and layer."""
    pages_available: int = 0
    """Of their contexts."""
    unranked_rows: int = 0
    """Rows (window, KV head) of layers whose scores were not all finite."""

    def add(self, windows: Windows, page: int, rows: int, *, varies: bool) -> None:
        """Counts a step.

        Args:
            windows: All of its windows.
            page: Tokens per page.
            rows: KV heads times layers that select.
            varies: Whether selected pages are counted later, layer by layer.
        """
        dense, sparse, count, fixed, selected, available = _tally(
            windows.num_tokens, windows.context_end, windows.far_begin, windows.far_end,
            windows.num_selected, windows.sparse, page,
        )  # fmt: skip
        self.dense_tokens += dense
        self.sparse_tokens += sparse
        self.sparse_windows += count
        self.pages_available += available * rows
        self.pages_attended += (fixed if varies else fixed + selected) * rows


@njit(cache=True)
def _tally(  # type: ignore[no-untyped-def]
    num_tokens, context_end, far_begin, far_end, num_selected, is_sparse, page
):
    """Tokens of dense and sparse windows; of the latter: how many, pages of each kind."""
    dense, sparse, count, fixed, selected, available = 0, 0, 0, 0, 0, 0
    for s in range(is_sparse.shape[0]):
        if not is_sparse[s]:
            dense += num_tokens[s]
            continue
        pages = (context_end[s] + page - 1) // page
        sparse += num_tokens[s]
        count += 1
        available += pages
        selected += num_selected[s]
        fixed += pages - (far_end[s] - far_begin[s])
    return dense, sparse, count, fixed, selected, available
