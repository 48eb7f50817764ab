"""The union of what an index hits and of key selection, as HAX attends (arXiv 2507.00449).

HAX gives every query 64 keys: 32 of its hash bucket, and the 32 that a trained scorer ranks first
whoever asks. Here a row's pages are split in the same way between the index's best pages and those
with the largest accumulated attention mass. A page is counted once, and a row has as many pages
as the budget says: where both want a page, key selection goes on to its next best, and where
the index has fewer pages with a hit than its share, key selection takes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import prange

from kvplug.compiled import compiled
from kvplug.errors import KvplugError
from kvplug.index.page_mass import PageMass
from kvplug.select.base import Select
from kvplug.select.bisection import PASSES, ZERO, order_of_bits, take_best, threshold_of
from kvplug.stage import Layer

if TYPE_CHECKING:
    from kvplug.step import Step

CHOSEN = np.uint32(0xFFFFFFFF)
"""An order above any mass: of pages that the index has chosen already."""


@dataclass(frozen=True)
class Union(Select):
    """The index's best pages and those with the largest mass.

    A page has a hit where its score is a number above 0. Of equal scores, and of equal masses, the
    newest page wins.
    """

    name = "union"
    lookahead = True

    split: float = 0.5
    """Share of a row's pages, 0 to 1, that goes to the index's best; rounded to the nearest page,
    halves up."""

    def __post_init__(self) -> None:
        """Refuses what is no share."""
        if not 0 <= self.split <= 1:
            raise KvplugError(f"Select 'union' needs 0 <= split <= 1, not {self.split}.")

    def for_layer(self, layer: Layer) -> Select:
        """See :meth:`Select.for_layer`."""
        return _Bound(self.split, pages=layer.own(PageMass))

    def select(
        self, scores: torch.Tensor, step: Step, counts: torch.Tensor, selected: torch.Tensor
    ) -> None:
        """Only a layer's own selector knows the mass."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bound(Union):
    """The selector of one layer."""

    pages: PageMass

    def select(
        self, scores: torch.Tensor, step: Step, counts: torch.Tensor, selected: torch.Tensor
    ) -> None:
        """See :meth:`Select.select`."""
        windows = step.windows
        _select_union(
            scores.numel() * 2 * PASSES, scores.numpy().view(np.uint32),
            self.pages.mass_host.view(np.uint32), self.split,
            step.sparse_windows, windows.request, windows.far_begin, windows.far_end,
            step.block_table_host, counts.numpy(), selected.numpy(),
        )  # fmt: skip


@compiled()
def _select_union(  # type: ignore[no-untyped-def]
    scores, mass, split, rows, request, far_begin, far_end, block_table, counts, selected
):
    """Writes ``selected``; ``scores`` and ``mass`` are the bits of floats."""
    num_kv_heads = scores.shape[1]
    for task in prange(rows.shape[0] * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        row, wanted = rows[w], counts[w, head]
        begin = far_begin[row]
        pages = block_table[request[row], begin : far_end[row]]
        mine = scores[w, head, : pages.shape[0]]
        hits = 0
        for n in range(mine.shape[0]):
            order = order_of_bits(mine[n])
            mine[n] = order if order > ZERO else np.uint32(0)
            hits += order > ZERO
        # No order is as large, so nothing is chosen unless a threshold takes its place.
        threshold, skip = CHOSEN, np.int64(0)
        share = min(np.int64(split * wanted + 0.5), np.int64(hits))
        if share > 0:
            threshold, skip = threshold_of(mine, share)
        for n in range(mine.shape[0]):
            is_chosen = mine[n] > threshold or (mine[n] == threshold and skip <= 0)
            skip -= mine[n] == threshold
            mine[n] = CHOSEN if is_chosen else order_of_bits(mass[pages[n], head])
        take_best(mine, wanted, begin, selected[w, head])


def union_reference(
    scores: torch.Tensor, mass: torch.Tensor, wanted: int, split: float, far_begin: int
) -> torch.Tensor:
    """Twin of :meth:`Union.select` in plain torch, for one window.

    Args:
        scores: ``[Hk, N]``.
        mass: ``[Hk, N]`` of the same pages.
        wanted: K.
        split: See :class:`Union`.
        far_begin: Logical page of the first score.

    Returns:
        ``[Hk, K]`` int32, ascending.
    """
    newest_first, chosen = list(range(scores.shape[1]))[::-1], []
    for row, weight in zip(scores.tolist(), mass.nan_to_num(-1.0).tolist(), strict=True):
        hits = [n for n in newest_first if 0 < row[n] < float("inf")]
        hits.sort(key=lambda n: -row[n])
        mine = hits[: int(split * wanted + 0.5)]
        rest = [n for n in newest_first if n not in mine]
        rest.sort(key=lambda n: -weight[n])
        chosen.append(sorted(mine + rest[: wanted - len(mine)]))
    return torch.tensor(chosen, dtype=torch.int32).reshape(len(scores), wanted) + far_begin
