"""Far pages made by hand, for tests of what scores them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvplug.kernels.far_pages import FarPages
from kvplug.step import Step
from tests.steps import Far, step_of

NUM_PAGES = 50
NOBODY = 2**30
"""Where a row of the block table ends; to read it would be to read out of bounds."""


class Windows(NamedTuple):
    """Windows over shuffled pages, as kernels and as stages see them."""

    far: FarPages
    counts: torch.Tensor
    """``[S]`` int32 probes of each window."""
    several: torch.Tensor
    """``[S]`` bool."""
    step: Step
    """Those with probes, for the twin on CPU."""


def windows_of(windows: list[Far], counts: list[int], device: str) -> Windows:
    """Windows of 1 or 2 requests; ``counts`` are their numbers of probes, 0 in unused rows."""
    width = max(window.end for window in windows) + 3
    table = torch.full((2, width), NOBODY, dtype=torch.int32)
    for row in range(2):
        last = max((w.end for w in windows if w.request == row), default=0)
        table[row, :last] = torch.randperm(NUM_PAGES)[:last]

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    # A column more than the rows have: rows may be strided.
    strided = torch.nn.functional.pad(table, (0, 5), value=NOBODY).to(device)[:, :width]
    far = FarPages(
        strided,
        column([window.request for window in windows]),
        column([window.begin for window in windows]),
        column([window.end for window in windows]),
    )
    several = torch.tensor([window.tokens > 1 for window in windows], device=device)
    used = [window for window, count in zip(windows, counts, strict=True) if count]
    return Windows(far, column(counts), several, step_of(used, table.contiguous()))
