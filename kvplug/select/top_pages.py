"""Top-k pages by score, found by radix selection: three counting passes, no sort."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.numeric import float_bits
from kvplug.select.base import Select

if TYPE_CHECKING:
    from kvplug.step import Step

DIGITS = ((21, 11), (10, 11), (0, 10))
"""Bit position and width of the three digits of a 32-bit key, most significant first."""
PASSES = len(DIGITS) + 2
"""Times that a score is looked at."""


@dataclass(frozen=True)
class TopPages(Select):
    """The best pages of each window and KV head."""

    name = "top"

    def select(
        self, scores: torch.Tensor, step: Step, counts: torch.Tensor, selected: torch.Tensor
    ) -> None:
        """See :meth:`Select.select`."""
        windows = step.windows
        _top_pages(
            scores.numel() * PASSES, scores.numpy(),
            step.sparse_windows, windows.far_begin, windows.far_end,
            counts.numpy(), selected.numpy(),
        )  # fmt: skip


@njit(cache=True, inline="always")
def _order(score):  # type: ignore[no-untyped-def]
    """An unsigned integer that orders as ``score`` does; NaN and infinities come first."""
    bits = float_bits(score)
    if bits & np.uint32(0x7F800000) == np.uint32(0x7F800000):
        return np.uint32(0)
    if bits == np.uint32(0x80000000):  # -0.0, which equals 0.0
        return bits
    if bits >> np.uint32(31) == 1:
        return ~bits
    return bits | np.uint32(0x80000000)


@njit(cache=True)
def _threshold(scores, wanted, histogram):  # type: ignore[no-untyped-def]
    """The ``wanted``-th largest key, and how many of the keys equal to it are wanted."""
    prefix, known = np.uint32(0), np.uint32(0)
    for shift, width in DIGITS:
        size = 1 << width
        histogram[:size] = 0
        for n in range(scores.shape[0]):
            key = _order(scores[n])
            if key & known == prefix:
                histogram[(key >> np.uint32(shift)) & np.uint32(size - 1)] += 1
        digit = size - 1
        while histogram[digit] < wanted:
            wanted -= histogram[digit]
            digit -= 1
        prefix |= np.uint32(digit) << np.uint32(shift)
        known |= np.uint32(size - 1) << np.uint32(shift)
    return prefix, wanted


@compiled()
def _top_pages(  # type: ignore[no-untyped-def]
    scores, rows, far_begin, far_end, counts, selected
):
    """Writes ``selected`` as :meth:`Select.select` says."""
    num_kv_heads = scores.shape[1]
    for task in prange(rows.shape[0] * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        row = rows[w]
        begin = far_begin[row]
        mine = scores[w, head, : far_end[row] - begin]
        histogram = np.empty(2048, dtype=np.int32)
        threshold, wanted_equal = _threshold(mine, counts[w, head], histogram)
        skip = -wanted_equal
        for n in range(mine.shape[0]):
            skip += _order(mine[n]) == threshold
        filled = 0
        for n in range(mine.shape[0]):
            key = _order(mine[n])
            if key < threshold:
                continue
            if key == threshold and skip > 0:
                skip -= 1
                continue
            selected[w, head, filled] = begin + n
            filled += 1


def top_pages_reference(scores: torch.Tensor, wanted: int, far_begin: int) -> torch.Tensor:
    """Twin of :meth:`TopPages.select` in plain torch, for one window.

    Args:
        scores: ``[Hk, N]``.
        wanted: K.
        far_begin: Logical page of the first score.

    Returns:
        ``[Hk, K]`` int32, ascending.
    """
    is_number = scores.isfinite()
    ranked = scores.where(is_number, -torch.inf)
    newest_first = torch.arange(scores.shape[1] - 1, -1, -1)
    chosen = []
    for row, valid in zip(ranked, is_number, strict=True):
        order = sorted(
            newest_first.tolist(), key=lambda n: (not valid[n], -float(row[n])), reverse=False
        )
        chosen.append(sorted(order[:wanted]))
    return torch.tensor(chosen, dtype=torch.int32).reshape(scores.shape[0], wanted) + far_begin
