"""What one step attended to, request by request; counted only where a request asked for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kvplug.windows import Ints, Windows

FIELDS = ("sparse_tokens", "sparse_windows", "pages_attended", "pages_available")
"""As :class:`kvplug.selection_counts.SelectionCounts` defines them."""
ATTENDED = FIELDS.index("pages_attended")


class RowCounts:
    """Counts of one step of one pipeline.

    Args:
        rows: ``B``, requests of the step.
    """

    def __init__(self, rows: int) -> None:
        """Starts at 0."""
        self.table: NDArray[np.int64] = np.zeros((rows, len(FIELDS)), np.int64)
        """``[B, 4]``, columns as FIELDS."""

    def add(self, windows: Windows, page: int, rows: int, *, varies: bool) -> None:
        """Counts a step, as :meth:`SelectionCounts.add` does for all requests together.

        Args:
            windows: All of its windows.
            page: Tokens per page.
            rows: KV heads times layers that select.
            varies: Whether selected pages are counted later, layer by layer.
        """
        sparse = windows.sparse
        pages = -(-windows.context_end[sparse].astype(np.int64) // page)
        attended = pages - windows.far_end[sparse] + windows.far_begin[sparse]
        if not varies:
            attended += windows.num_selected[sparse]
        tokens = windows.num_tokens[sparse]
        columns = (tokens, np.ones_like(tokens), attended * rows, pages * rows)
        np.add.at(self.table, windows.request[sparse], np.stack(columns, axis=1))

    def add_selected(self, requests: Ints, counts: torch.Tensor) -> None:
        """Counts the far pages of one layer, where a recipe's budget varies.

        Args:
            requests: ``[W]`` row of each sparse window.
            counts: ``[W, Hk]`` int32 pages.
        """
        np.add.at(self.table[:, ATTENDED], requests, counts.sum(1).numpy())
