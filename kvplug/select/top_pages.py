"""Top-k pages by score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import prange

from kvplug.compiled import compiled
from kvplug.select.base import Select
from kvplug.select.bisection import PASSES, put_in_order, take_best

if TYPE_CHECKING:
    from kvplug.step import Step


@dataclass(frozen=True)
class TopPages(Select):
    """The best pages of each window and KV head."""

    name = "top"
    gives = frozenset({"best first"})

    def select(
        self, scores: torch.Tensor, step: Step, counts: torch.Tensor, selected: torch.Tensor
    ) -> None:
        """See :meth:`Select.select`."""
        windows = step.windows
        _top_pages(
            scores.numel() * PASSES, scores.numpy().view(np.uint32),
            step.sparse_windows, windows.far_begin, windows.far_end,
            counts.numpy(), selected.numpy(),
        )  # fmt: skip


@compiled()
def _top_pages(  # type: ignore[no-untyped-def]
    scores, rows, far_begin, far_end, counts, selected
):
    """Writes ``selected`` as :meth:`Select.select` says; ``scores`` are the bits of floats."""
    num_kv_heads = scores.shape[1]
    for task in prange(rows.shape[0] * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        row = rows[w]
        begin = far_begin[row]
        mine = scores[w, head, : far_end[row] - begin]
        put_in_order(mine)
        take_best(mine, counts[w, head], begin, selected[w, head])


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
