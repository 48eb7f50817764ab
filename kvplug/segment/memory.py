"""What surprise segmentation remembers, by slot and by page; shared by all layers."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from kvplug.stage import Layer, Memory


class SurpriseMemory(Memory):
    """Surprises, boundary tokens, and where the model stood at the end of each window.

    The last serves the first token of the next step's window, and of a request that enters behind
    a prefix hit: its surprise follows from the hidden state before it, which nobody computes again.
    It lies on the window's last page: who finds that page cached has all of the window.
    """

    def __init__(self, layer: Layer) -> None:
        """Knows nothing."""
        super().__init__(layer)
        shape = (layer.shape.num_pages, layer.shape.page)
        self.surprise = torch.full(shape, torch.nan)
        """``[pages, P]`` float32, nats; NaN where unknown, as for decoded tokens."""
        self.boundary = torch.zeros(shape, dtype=torch.uint8)
        """``[pages, P]``: marks of :mod:`kvplug.segment.cut`, of events to the token."""
        self.known = torch.zeros(shape[0], dtype=torch.uint8)
        """``[pages]``: 1 where a window of a prompt ends whose last state is in ``hidden``."""
        self.hidden: torch.Tensor | None = None
        """``[pages, hidden_size]``, on a window's last page; rows of other pages are never
        touched. None before the first step, which tells size and type."""
        self._host = self.surprise.numpy(), self.boundary.numpy(), self.known.numpy()

    def forget(self, slots: torch.Tensor) -> None:
        """See :meth:`Memory.forget`."""
        _forget(slots.numpy(), *self._host)

    def remember(self, pages: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        """Keeps the hidden states at the ends of windows.

        Args:
            pages: ``[n]`` int64, last page of each window.
            hidden: ``[T, hidden_size]``.
            rows: ``[n]`` int64, each window's last token.
        """
        if self.hidden is None:
            self.hidden = hidden.new_zeros((self.shape.num_pages, hidden.shape[1]))
        self.hidden[pages] = hidden[rows]
        self.known[pages] = 1

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See the class."""
        learnt = (self.surprise, self.boundary, self.known)
        return learnt if self.hidden is None else (*learnt, self.hidden)

    def nbytes(self) -> float:
        """See :meth:`Memory.nbytes`; of hidden states, one page of a window has one."""
        hidden = 0 if self.hidden is None else self.hidden.nbytes
        return super().nbytes() - hidden + hidden * self.shape.page / self.shape.window


@njit(cache=True)
def _forget(slots, surprise, boundary, known):  # type: ignore[no-untyped-def]
    """Clears what written slots held; a window's end is gone with its first slot."""
    page = surprise.shape[1]
    for token in range(slots.shape[0]):
        slot = slots[token]
        if slot < 0:
            continue
        surprise[slot // page, slot % page] = np.nan
        boundary[slot // page, slot % page] = 0
        if slot % page == 0:
            known[slot // page] = 0
