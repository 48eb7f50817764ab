"""Which pages lie side by side in a context, and which make up an event; shared by all layers.

By physical page, as everything that a layer remembers. A page that several contexts share has the
neighbours of the last one that was attended to; a link that is out of date misleads what is read
ahead or gives way, and nothing else. Where a recipe has no events, every page is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kvplug.segment.base import EventStarts
    from kvplug.step import Step

NONE = -1
LONGEST = 64
"""Pages of an event that are looked at: old links could go round in circles."""


class LinkArrays(NamedTuple):
    """What compiled code follows."""

    after: NDArray[np.int32]
    """``[pages]`` the next page of the context, or NONE."""
    before: NDArray[np.int32]
    """``[pages]`` the one before, or NONE."""
    head: NDArray[np.int32]
    """``[pages]`` first page of the event that a page is in; NONE where nothing is known."""

    @classmethod
    def empty(cls, pages: int) -> LinkArrays:
        """Nothing is known; of 0 pages where nobody asks."""
        return cls(*(np.full(pages, NONE, np.int32) for _ in range(3)))


class Links:
    """Keeps the links of the contexts that a worker retrieves from.

    Args:
        pages: Of the cache.
    """

    def __init__(self, pages: int) -> None:
        """Knows nothing."""
        self.arrays = LinkArrays.empty(pages)
        self.events: EventStarts | None = None
        """Where events begin; None where every page is one."""
        self._none = np.zeros(0, np.uint8)
        self._step: Step | None = None

    def follow(self, step: Step) -> None:
        """Links the far pages of a step's windows, once a step."""
        if step is self._step:
            return
        self._step = step
        starts, most = self._none, 1
        if self.events is not None:
            starts, most = self.events.starts.numpy(), self.events.most_pages
        windows = step.windows
        link_pages(
            self.arrays, step.block_table_host, step.sparse_windows, windows.request,
            windows.far_begin, windows.far_end, starts, most,
        )  # fmt: skip


@njit(cache=True)
def link_pages(  # type: ignore[no-untyped-def]
    links, block_table, rows, request, far_begin, far_end, starts, most
):
    """Links the pages of each request's last sparse window; see :class:`Links`."""
    for w in range(rows.shape[0]):
        row = rows[w]
        if w + 1 < rows.shape[0] and request[rows[w + 1]] == request[row]:
            continue  # its far pages are among those of the next window
        pages = block_table[request[row], far_begin[row] : far_end[row]]
        before, head, length = NONE, NONE, most
        for n in range(pages.shape[0]):
            page = pages[n]
            if length == most or n == 0 or (starts.shape[0] and starts[page]):
                head, length = page, 0
            length += 1
            links.before[page], links.head[page], links.after[page] = before, head, NONE
            if before != NONE:
                links.after[before] = page
            before = page


@njit(cache=True)
def next_in_event(links, page, head):  # type: ignore[no-untyped-def]
    """The page behind ``page`` in the event that begins with ``head``, or NONE."""
    after = links.after[page]
    return after if after != NONE and links.head[after] == head else NONE
