"""Which pages a step's windows leave behind: complete, past the local region, not yet summarised.

A page is *sealed* once, by the first window that retrieves and may choose it. Which window that is
follows from positions alone (a page is far from the first query on whose local region begins behind
it), so neither the scheduler's chunks nor the batch matter; and a context that never grows beyond
``dense_below`` pays for nothing.

How to use it, in a :class:`~kvplug.stage.Memory` that stores something for a page when it seals::

    def __init__(self, layer):
        super().__init__(layer)
        self._seals = Seals(self.shape.num_pages)

    def write(self, keys, slots):
        self._seals.reset(slots, self.shape.page)      # a page that is written to is open

    def watch(self, passage):
        sealed = self._seals.seal(passage.step, passage.workspace)   # marks them as sealed
        for_every(sealed.pages ...)                    # numba, over all of them at once

    state: (self._seals.flags, ...)                    # physical page first

Where the windows' own order matters (what is stored depends on queries seen so far), loop over
windows ``s`` of ``step.stream`` and seal ``pages[starts[s] : starts[s + 1]]`` before or after what
window ``s`` itself contributes. The keys of a sealed page are all in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from numba import njit

if TYPE_CHECKING:
    from kvplug.step import Step
    from kvplug.windows import Ints
    from kvplug.workspace import Workspace


class Sealing(NamedTuple):
    """Pages that a step seals, ``n`` of them, window by window; valid until anyone seals again."""

    pages: Ints
    """``[n]`` physical pages, each once. Within a window they ascend logically."""
    logical: Ints
    """``[n]`` their numbers in the context of the window that seals them."""
    starts: Ints
    """``[S + 1]`` first entry of each window of ``step.stream``, then n."""


class Seals:
    """Which physical pages are sealed: a byte each.

    Args:
        num_pages: Physical pages of the cache.
    """

    def __init__(self, num_pages: int) -> None:
        """Every page is open."""
        self.flags = torch.zeros(num_pages, dtype=torch.uint8)
        """``[pages]``: 1 where sealed."""
        self._flags_host = self.flags.numpy()

    def reset(self, slots: torch.Tensor, page: int) -> None:
        """Opens every page that is written to: new content, or a rejected draft's successor.

        Args:
            slots: ``[T]`` int64; negative ones are padding.
            page: Tokens per page, P.
        """
        _open_pages(slots.numpy(), page, self._flags_host)

    def seal(self, step: Step, workspace: Workspace) -> Sealing:
        """Finds the pages that the step's windows leave behind, and marks them as sealed.

        Args:
            step: ``step.stream`` names the windows.
            workspace: Owns the result.
        """
        stream = step.stream
        # Each page is named once, so this is enough; memory that is not written costs nothing.
        columns = workspace.take("sealing.pages", (2, self.flags.shape[0]), torch.int32).numpy()
        starts = workspace.take("sealing.starts", (len(stream) + 1,), torch.int32).numpy()
        seal_pages(
            stream.request, stream.sparse, stream.far_begin, stream.far_end,
            step.block_table_host, self._flags_host, columns[0], columns[1], starts,
        )  # fmt: skip
        count = int(starts[-1])
        return Sealing(columns[0, :count], columns[1, :count], starts)


@njit(cache=True)
def _open_pages(slots, page, flags):  # type: ignore[no-untyped-def]
    """``flags[page of slot] = 0``."""
    for token in range(slots.shape[0]):
        if slots[token] >= 0:
            flags[slots[token] // page] = 0


@njit(cache=True)
def seal_pages(  # type: ignore[no-untyped-def]
    request, sparse, far_begin, far_end, block_table, flags, pages, logical, starts
):
    """Fills a :class:`Sealing` and sets ``flags``.

    A request's first sparse window of the step looks at all of its far pages, a later one only at
    those behind the window before. Looking back to the nearest sealed page would not do: a prefix
    hit may join blocks of several requests, of which some ended before they sealed theirs. A look
    costs a byte, read in order.
    """
    count = 0
    for s in range(request.shape[0]):
        starts[s] = count
        if not sparse[s]:
            continue
        begin = far_begin[s]
        if s > 0 and request[s - 1] == request[s] and sparse[s - 1]:
            begin = max(begin, far_end[s - 1])
        mine = block_table[request[s]]
        for n in range(begin, far_end[s]):
            page = mine[n]
            if flags[page] == 0:
                flags[page] = 1
                pages[count] = page
                logical[count] = n
                count += 1
    starts[request.shape[0]] = count


def seal_pages_reference(step: Step, flags: torch.Tensor) -> list[list[tuple[int, int]]]:
    """Twin of :meth:`Seals.seal` in plain Python: sets ``flags``.

    Returns:
        Per window of the stream, the (physical, logical) pages that it seals.
    """
    stream, sealed = step.stream, []
    for s in range(len(stream)):
        mine = step.block_table[int(stream.request[s])].tolist()
        far = range(int(stream.far_begin[s]), int(stream.far_end[s]) if stream.sparse[s] else 0)
        sealed.append([(mine[n], n) for n in far if flags[mine[n]] == 0])
        flags[[page for page, _ in sealed[-1]]] = 1
    return sealed
