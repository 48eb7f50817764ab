"""Pages that a step writes to: the same in every layer, so found once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray


class Written(NamedTuple):
    """What a step writes."""

    pages: NDArray[np.int64]
    """``[n]`` physical pages, each once, ascending."""
    begun: NDArray[np.uint8]
    """``[n]`` whether the first token of each was written: it has new content from then on."""
    tokens: int
    """How many keys."""

    @classmethod
    def of(cls, slots: torch.Tensor, page: int) -> Written:
        """Of the places that keys go to.

        Args:
            slots: ``[T]`` int64, ``page * P + offset``; negative ones are padding.
            page: P.
        """
        places = slots.numpy()
        if len(places) == 1 and places[0] >= 0:  # a decoded token, for which a call costs more
            number, offset = divmod(int(places[0]), page)
            return cls(np.array([number]), np.array([offset == 0], np.uint8), 1)
        return cls(*_written(places, page))


@njit(cache=True)
def _written(places, page):  # type: ignore[no-untyped-def]
    pages = np.empty(places.shape[0], np.int64)
    count, tokens = 0, 0
    for place in places:
        if place >= 0:
            tokens += 1
            if not count or pages[count - 1] != place // page:
                pages[count] = place // page
                count += 1
    pages = np.unique(pages[:count])
    begun = np.zeros(pages.shape[0], np.uint8)
    for place in places:
        if place >= 0 and place % page == 0:
            begun[np.searchsorted(pages, place // page)] = 1
    return pages, begun, tokens
