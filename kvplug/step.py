"""What the stages know of one engine step."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from kvplug.windows import Ints, Windows


class Step:
    """One step's windows and the pages behind them; every layer of the step shares it.

    Args:
        windows: The step's ``S`` windows.
        block_table: ``[B, max_pages]`` int32, physical page of each logical page of a request.
    """

    def __init__(self, windows: Windows, block_table: torch.Tensor) -> None:
        """Holds its arguments."""
        self.windows = windows
        self.block_table = block_table

    @cached_property
    def block_table_host(self) -> Ints:
        """``block_table`` as an array over the same memory (host only)."""
        return self.block_table.numpy()

    @cached_property
    def sparse_windows(self) -> Ints:
        """``[W]`` numbers of the windows that select pages."""
        return np.flatnonzero(self.windows.sparse).astype(np.int32)

    @cached_property
    def max_far_pages(self) -> int:
        """N: the most retrievable pages that any window of the step has."""
        rows = self.sparse_windows
        return int((self.windows.far_end[rows] - self.windows.far_begin[rows]).max(initial=0))

    @cached_property
    def max_selected(self) -> int:
        """K: the most far pages that any window of the step selects."""
        return int(self.windows.num_selected.max(initial=0))
