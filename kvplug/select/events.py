"""Whole events by score, and their neighbours in time.

The two retrieval buffers of Fountas et al. (2025, "Human-inspired Episodic Memory for Infinite
Context LLMs", arXiv 2407.09450): events by similarity, and around them what came after and before.
An event scores as the best of its pages. Where this differs from the authors' code:

- A row has exactly as many pages as the budget says. The last event by similarity is kept whole if
  overshoot is below undershoot, as theirs, but never beyond the budget, and left out otherwise.
  Of the last neighbour the nearest pages are taken. Where neighbours do not fill their share, or
  have none, events by similarity fill it, the last one with its best pages.
- Neighbours are those of the window's own events. Theirs stay from step to step, first in, first
  out: what a request attends to would then depend on the steps in which it was computed.
- KV heads select separately, unless the index scores them alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import prange

from kvplug.compiled import compiled
from kvplug.errors import KvplugError
from kvplug.segment.base import EventStarts
from kvplug.select.base import Select
from kvplug.select.event_choice import choose_events, find_events
from kvplug.stage import Layer, Scratch
from kvplug.workspace import Workspace

if TYPE_CHECKING:
    from kvplug.step import Step

PASSES = 8
"""Times that a page is looked at, the heap included."""


@dataclass(frozen=True)
class Events(Select):
    """Events by score until the budget is full; a share of it goes to their neighbours."""

    name = "events"
    needs = MappingProxyType({"events": "to select them"})

    contiguity: float = 0.3
    """Share of the budget for neighbours of the selected events, rounded down to pages."""

    def __post_init__(self) -> None:
        """Refuses shares that leave no events."""
        if not 0 <= self.contiguity < 1:
            raise KvplugError(
                f"select {self.name!r} needs 0 <= contiguity < 1, not {self.contiguity}."
            )

    def for_layer(self, layer: Layer) -> Select:
        """See :meth:`Select.for_layer`."""
        scratch = layer.shared(Scratch).workspace
        return _Bound(self.contiguity, events=layer.shared(EventStarts), scratch=scratch)

    def select(
        self, scores: torch.Tensor, step: Step, counts: torch.Tensor, selected: torch.Tensor
    ) -> None:
        """Only a layer's own selector knows the events."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bound(Events):
    """The selector of one layer."""

    events: EventStarts
    scratch: Workspace

    def select(
        self, scores: torch.Tensor, step: Step, counts: torch.Tensor, selected: torch.Tensor
    ) -> None:
        """See :meth:`Select.select`."""
        windows, rows = step.windows, scores.shape[0] * scores.shape[1]
        width = scores.shape[2]
        take = self.scratch.take
        _select_events(
            scores.numel() * PASSES, scores.numpy(), step.sparse_windows,
            windows.request, windows.far_begin, windows.far_end, step.block_table_host,
            self.events.starts.numpy(), self.events.most_pages, self.contiguity, counts.numpy(),
            take("events.begin", (rows, width + 1), torch.int32).numpy(),
            take("events.heap", (rows, width), torch.int64).numpy().view(np.uint64),
            take("events.ranked", (rows, width), torch.int32).numpy(),
            take("events.taken", (rows, width), torch.uint8).numpy(),
            selected.numpy(),
        )  # fmt: skip


@compiled()
def _select_events(  # type: ignore[no-untyped-def]
    scores, rows, request, far_begin, far_end, block_table, starts, most, contiguity, counts,
    begin, heap, ranked, taken, selected,
):  # fmt: skip
    """Writes ``selected`` as :meth:`Select.select` says; the scratch has a row per window, head."""
    num_kv_heads = scores.shape[1]
    for task in prange(rows.shape[0] * num_kv_heads):
        w, head = task // num_kv_heads, task % num_kv_heads
        row, wanted = rows[w], counts[w, head]
        first, count = far_begin[row], far_end[row] - far_begin[row]
        events = find_events(
            block_table[request[row], first : first + count], starts, most, begin[task]
        )
        choose_events(
            scores[w, head, :count], begin[task], events, wanted, int(contiguity * wanted),
            heap[task], ranked[task], taken[task, :count],
        )  # fmt: skip
        filled = 0
        for n in range(count):
            if taken[task, n]:
                selected[w, head, filled] = first + n
                filled += 1


def events_reference(
    scores: torch.Tensor, begins: list[int], wanted: int, contiguity: float
) -> list[int]:
    """Twin of :func:`_select_events` in plain Python, for one row.

    Args:
        scores: ``[N]``.
        begins: First page of each event; the first is 0.
        wanted: Pages to select.
        contiguity: Share of neighbours.

    Returns:
        Places of the selected pages, ascending.
    """

    def rank(pages: list[int]) -> tuple[bool, float, int]:
        best = max((float(scores[n]) for n in pages if scores[n].isfinite()), default=None)
        return best is not None, best or 0.0, pages[0]

    ends = [*begins[1:], len(scores)]
    events = [list(range(a, b)) for a, b in zip(begins, ends, strict=True)]
    order = sorted(range(len(events)), key=lambda e: rank(events[e]), reverse=True)
    taken: list[int] = []
    share, kept = wanted - int(contiguity * wanted), 0
    for event in order:
        room, length = share - len(taken), len(events[event])
        fits = length <= room or (length - room < room and length <= wanted - len(taken))
        if room <= 0 or not fits:
            break
        taken += events[event]
        kept += 1
    queue: list[int] = []
    if share < wanted:
        for event in order[:kept]:
            queue += events[event + 1] if event + 1 < len(events) else []
            queue += events[event - 1][::-1] if event else []
    for event in order[kept:]:
        queue += sorted(events[event], key=lambda n: rank([n]), reverse=True)
    for page in queue:
        if len(taken) < wanted and page not in taken:
            taken.append(page)
    return sorted(taken)
