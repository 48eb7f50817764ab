"""Top-p budget of Twilight (Lin et al. 2025, arXiv 2502.02770): as many pages as hold a mass.

Where attention is sharp a few pages hold almost all of it, and where it is flat no number is too
many; a fixed budget is too much for the first and arbitrary for the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.budget.base import Budget
from kvplug.compiled import compiled
from kvplug.errors import KvplugError
from kvplug.numeric import float_bits

if TYPE_CHECKING:
    from kvplug.step import Step
    from kvplug.workspace import Workspace

OPERATIONS = 16
"""Of a score, to estimate work."""
DIGITS = ((21, 11), (10, 11), (0, 10))
"""Bit position and width of the three digits of a 32-bit mass, most significant first."""
BINS = 1 << 11
"""Values of the widest digit."""


@dataclass(frozen=True)
class TopPBudget(Budget):
    """The fewest pages whose estimated mass among the far pages is ``p``, up to the budget.

    A page's mass is the softmax of its score, as if a page were one token: an estimate, and with
    min/max bounds a flat one.
    """

    name = "top_p"
    varies = True
    needs = MappingProxyType({"logits": "to know what share of the attention mass pages hold"})

    p: float = 0.85
    """Share of the mass; 1 is the whole budget."""
    temperature: float = 1.0
    """Of the softmax; below 1 makes it sharper, to make up for flat estimates."""

    def __post_init__(self) -> None:
        """Refuses shares that no number of pages holds."""
        if not 0 < self.p <= 1:
            raise KvplugError(f"top_p budget needs 0 < p <= 1, not {self.p}.")
        if not 0.01 <= self.temperature <= 100:
            raise KvplugError(
                f"top_p budget needs 0.01 <= temperature <= 100, not {self.temperature}."
            )

    def pages(self, budget: int, page: int) -> int:
        """See :meth:`Budget.pages`."""
        return budget // page

    def count(
        self, scores: torch.Tensor, queries: torch.Tensor, step: Step, counts: torch.Tensor,
        workspace: Workspace,
    ) -> None:  # fmt: skip
        """See :meth:`Budget.count`; NaN and infinite scores weigh nothing."""
        if self.p == 1:
            return
        windows = step.windows
        masses = workspace.take("budget.masses", tuple(scores.shape), torch.float32)
        _count_masses(
            scores.numel() * OPERATIONS, scores.numpy(), step.sparse_windows, windows.far_begin,
            windows.far_end, np.float32(1 / self.temperature), self.p, masses.numpy(),
            counts.numpy(),
        )  # fmt: skip


@njit(cache=True)
def _masses(scores, sharpness, masses):  # type: ignore[no-untyped-def]
    """``masses = exp(sharpness * (scores - their largest))``; their sum."""
    best = np.float32(-np.inf)
    for score in scores:
        if np.isfinite(score):
            best = max(best, score)
    total = 0.0
    for n in range(scores.shape[0]):
        finite = np.isfinite(scores[n])
        masses[n] = np.exp((scores[n] - best) * sharpness) if finite else np.float32(0)
        total += masses[n]
    return total


@njit(cache=True)
def _fewest(masses, wanted, histogram, sums):  # type: ignore[no-untyped-def]
    """How many of the largest ``masses`` it takes to sum to ``wanted``, found digit by digit.

    Floats that are not negative have bits that order as they do.
    """
    prefix, known, count = np.uint32(0), np.uint32(0), 0
    for shift, width in DIGITS:
        size = 1 << width
        histogram[:size] = 0
        sums[:size] = 0
        for n in range(masses.shape[0]):
            key = float_bits(masses[n])
            if key & known == prefix:
                digit = (key >> np.uint32(shift)) & np.uint32(size - 1)
                histogram[digit] += 1
                sums[digit] += masses[n]
        digit = size - 1
        while digit > 0 and sums[digit] < wanted:
            wanted -= sums[digit]
            count += histogram[digit]
            digit -= 1
        prefix |= np.uint32(digit) << np.uint32(shift)
        known |= np.uint32(size - 1) << np.uint32(shift)
    # The last digit's are all equal.
    each = sums[digit] / max(histogram[digit], 1)
    return count + (np.int64(np.ceil(wanted / each)) if each > 0 else 0)


@compiled()
def _count_masses(  # type: ignore[no-untyped-def]
    scores, rows, far_begin, far_end, sharpness, p, masses, counts
):
    """Lowers ``counts`` to the fewest pages that hold ``p`` of the mass."""
    heads = scores.shape[1]
    for task in prange(rows.shape[0] * heads):
        w, head = task // heads, task % heads
        pages = far_end[rows[w]] - far_begin[rows[w]]
        mine = masses[w, head, :pages]
        total = _masses(scores[w, head, :pages], sharpness, mine)
        if total > 0:
            histogram, sums = np.empty(BINS, dtype=np.int32), np.empty(BINS, dtype=np.float64)
            fewest = _fewest(mine, p * total, histogram, sums)
            counts[w, head] = min(max(fewest, 1), counts[w, head])


def fewest_reference(scores: torch.Tensor, p: float) -> torch.Tensor:
    """Twin of the count in plain torch, for finite logits, before the budget caps it.

    Args:
        scores: ``[..., N]`` logits.
        p: Share of the mass.

    Returns:
        ``[...]`` int64.
    """
    held = scores.double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    return 1 + (held < p).sum(-1).clamp(max=scores.shape[-1] - 1)
