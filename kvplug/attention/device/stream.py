"""The stream of a step on a GPU: all of its windows, in order, as what watchers learn from.

On CPU it is :attr:`kvplug.step.Step.stream`. It is cut on the host from lengths; where a request
keeps what it carries from window to window (:mod:`kvplug.carry`) follows from them too, as logical
pages, which kernels look up in the block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kvplug.carry import NOWHERE, carried
from kvplug.windows import Flags, Ints, Windows

if TYPE_CHECKING:
    import torch


class CarriedWindows(NamedTuple):
    """The ``n`` windows of a stream that move what their requests carry, in the stream's order.

    Those of prompts, and decoded tokens that begin a window or its last page. Of windows of one
    request, and of one that begins with pages that another fills in the same step, a later one
    finds what an earlier one left.
    """

    prompts: int
    """How many are windows of prompts; the others hand on only."""
    scored: int
    """How many of these select pages."""
    request: torch.Tensor
    """``[n]`` int32 row of the block table."""
    token_start: torch.Tensor
    """``[n]`` int32 first query token."""
    num_tokens: torch.Tensor
    """``[n]`` int32 query tokens."""
    prefills: torch.Tensor
    """``[n]`` int32, 1 for a window of a prompt; a decoded token only hands on, 0."""
    before: torch.Tensor
    """``[n]`` int32 logical page to go on from; negative at the start of a request."""
    here: torch.Tensor
    """``[n]`` int32 logical page to write to."""
    also: torch.Tensor
    """``[n]`` int32 another one; may be the same."""
    sparse: torch.Tensor
    """``[n]`` int32 row among the step's sparse windows; negative: it attends to everything."""

    def __len__(self) -> int:
        """n."""
        return len(self.request)


class StreamWindows(NamedTuple):
    """All ``W`` windows of a step in the order of their tokens, dense ones too, none merged.

    A request's windows follow one another in the order of their positions.
    """

    windows: Windows
    """On the host, as ``cut_windows(..., merge=False)`` gives them."""
    request: torch.Tensor
    """``[W]`` int32 row of the block table; like all that follow, on the device."""
    token_start: torch.Tensor
    """``[W]`` int32 first query token."""
    num_tokens: torch.Tensor
    """``[W]`` int32 query tokens."""
    context_end: torch.Tensor
    """``[W]`` int32 tokens of context, the window's own included."""
    far_end: torch.Tensor
    """``[W]`` int32 first page that is local to the window's first query, sinks left out."""
    prefills: torch.Tensor
    """``[W]`` int32, 1 for a window of a prompt, 0 for a decoded token."""
    carried: CarriedWindows
    """Those that move what their requests carry."""

    def __len__(self) -> int:
        """W."""
        return len(self.request)


class HostStream(NamedTuple):
    """A stream before it is sent."""

    windows: Windows
    of_sparse: tuple[Ints, Ints]
    """``[S]`` logical pages with what is carried to the step's sparse windows, in their order, and
    whether these are windows of prompts."""
    counts: tuple[int, int]
    """The first two fields of :class:`CarriedWindows`."""
    columns: tuple[Ints, ...]
    """The other columns of :class:`StreamWindows`, then those of :class:`CarriedWindows`."""

    @classmethod
    def of(
        cls, windows: Windows, is_prefilling: Flags, places: NDArray[np.int64], window: int,
        page: int,
    ) -> HostStream:  # fmt: skip
        """Finds what is to be sent.

        Args:
            windows: Of the stream, ``W`` of them.
            is_prefilling: ``[B]`` whether a request's prompt was incomplete before the step.
            places: ``[S]`` row of each sparse window, in the stream's order, among those that are
                sent.
            window: Tokens of a whole window.
            page: Tokens per page.
        """
        prefills = is_prefilling[windows.request].astype(np.int32)
        pages = np.empty((3, len(windows)), np.int32)
        _find_pages(windows.num_tokens, windows.context_end, prefills, window, page, pages)
        of_sparse = np.empty((2, len(places)), np.int32)
        of_sparse[:, places] = pages[0, windows.sparse], prefills[windows.sparse]
        sparse = np.full(len(windows), -1, np.int32)
        sparse[windows.sparse] = places
        moving = np.flatnonzero(pages[1] != NOWHERE)
        own = windows.request, windows.token_start, windows.num_tokens
        carried = (column[moving] for column in (*own, prefills, *pages, sparse))
        columns = *own, windows.context_end, windows.far_end, prefills, *carried
        counts = int(prefills.sum()), int(of_sparse[1].sum())
        return cls(windows, (of_sparse[0], of_sparse[1]), counts, columns)

    def on_device(self, columns: Sequence[torch.Tensor]) -> StreamWindows:
        """The stream, of its columns as they were sent."""
        request, start, tokens, end, far_end, prefills, *rest = columns
        carried = CarriedWindows(*self.counts, *rest)
        return StreamWindows(self.windows, request, start, tokens, end, far_end, prefills, carried)


@njit(cache=True)
def _find_pages(num_tokens, context_end, prefills, window, page, found):  # type: ignore[no-untyped-def]
    """``found [3, W]``: the logical pages that :func:`kvplug.carry.carried` says."""
    for s in range(num_tokens.shape[0]):
        end = context_end[s]
        places = carried(end - num_tokens[s], end, prefills[s] != 0, window, page)
        for i in range(3):
            found[i, s] = places[i]
