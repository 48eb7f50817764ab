"""Which pages a step's windows leave behind: complete, past the local region, not yet summarised.

A page is *sealed* once, by the first window that retrieves and may choose it. Which window that is
follows from positions alone (a page is far from the first query on whose local region begins behind
it), so neither the scheduler's chunks nor the batch matter; and a context that never grows beyond
``dense_below`` pays for nothing. All layers seal the same pages in the same step, so the pipeline
asks once for all of them, and hands the pages to every memory that summarises
(:meth:`kvplug.stage.Memory.seal`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit

from kvplug.step import Sealing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvplug.step import Step
    from kvplug.workspace import Workspace

    Slots = NDArray[np.int64]


class Seals:
    """Which physical pages are sealed, and at which contexts begin that were retrieved from.

    Args:
        num_pages: Physical pages of the cache.
    """

    def __init__(self, num_pages: int) -> None:
        """Every page is open."""
        self.flags = torch.zeros(num_pages, dtype=torch.uint8)
        """``[pages]``: 1 where sealed."""
        self._flags_host = self.flags.numpy()
        self._begun_host = np.zeros(num_pages, np.uint8)

    def reset(self, slots: Slots, page: int) -> None:
        """Opens every page that is written to: new content, or a rejected draft's successor.

        A context that begins there has not begun then.

        Args:
            slots: ``[T]`` int64; negative ones are padding.
            page: Tokens per page, P.
        """
        _open_pages(slots, page, self._flags_host, self._begun_host)

    def seal(self, step: Step, workspace: Workspace) -> Sealing:
        """Finds the pages that the step's windows leave behind, and marks them as sealed.

        Args:
            step: ``step.windows`` are those that seal.
            workspace: Owns the result.
        """
        windows = step.windows
        # Each page is named once, so this is enough; memory that is not written costs nothing.
        columns = workspace.take("sealing.pages", (2, self.flags.shape[0]), torch.int32).numpy()
        starts = workspace.take("sealing.starts", (len(windows) + 1,), torch.int32).numpy()
        begun = workspace.take("sealing.begun", (len(windows),), torch.int32).numpy()
        begins = seal_pages(
            windows.request, windows.sparse, windows.far_begin, windows.far_end,
            step.block_table_host, self._flags_host, self._begun_host, *columns, starts, begun,
        )  # fmt: skip
        count = int(starts[-1])
        return Sealing(columns[0, :count], columns[1, :count], starts, begun[:begins])


@njit(cache=True)
def _open_pages(slots, page, flags, has_begun):  # type: ignore[no-untyped-def]
    """Sets both to 0 for the pages of ``slots``."""
    for token in range(slots.shape[0]):
        if slots[token] >= 0:
            flags[slots[token] // page] = 0
            has_begun[slots[token] // page] = 0


@njit(cache=True)
def seal_pages(  # type: ignore[no-untyped-def]
    request, sparse, far_begin, far_end, block_table, flags, has_begun, pages, logical, starts,
    begun,
):  # fmt: skip
    """Fills a :class:`Sealing`, sets ``flags`` and ``has_begun``; returns how many contexts begin.

    A request's first sparse window of the step looks at all of its far pages, a later one only at
    those behind the window before. Looking back to the nearest sealed page would not do: a prefix
    hit may join blocks of several requests, of which some ended before they sealed theirs. A look
    costs a byte, read in order.
    """
    count, begins = 0, 0
    for s in range(request.shape[0]):
        starts[s] = count
        if not sparse[s]:
            continue
        begin = far_begin[s]
        if s > 0 and request[s - 1] == request[s] and sparse[s - 1]:
            begin = max(begin, far_end[s - 1])
        mine = block_table[request[s]]
        if has_begun[mine[0]] == 0:
            has_begun[mine[0]] = 1
            begun[begins] = request[s]
            begins += 1
        for n in range(begin, far_end[s]):
            page = mine[n]
            if flags[page] == 0:
                flags[page] = 1
                pages[count] = page
                logical[count] = n
                count += 1
    starts[request.shape[0]] = count
    return begins


def seal_pages_reference(step: Step, flags: torch.Tensor) -> list[list[tuple[int, int]]]:
    """Twin of :meth:`Seals.seal` in plain Python: sets ``flags``.

    Returns:
        Per window, the (physical, logical) pages that it seals.
    """
    windows, sealed = step.windows, []
    for s in range(len(windows)):
        mine = step.block_table[int(windows.request[s])].tolist()
        far = range(int(windows.far_begin[s]), int(windows.far_end[s]) if windows.sparse[s] else 0)
        sealed.append([(mine[n], n) for n in far if flags[mine[n]] == 0])
        flags[[page for page, _ in sealed[-1]]] = 1
    return sealed
