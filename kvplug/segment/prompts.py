"""The parts of a step that belong to prompts, as arrays that segmentation works on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvplug.step import Step
    from kvplug.windows import Ints


class Prompts(NamedTuple):
    """The ``n`` prompt windows of a step, in the order of its stream, and their ``T`` tokens."""

    request: Ints
    """``[n]`` row of the batch."""
    first: Ints
    """``[n]`` position of the window's first token in the request."""
    tokens: Ints
    """``[n]`` tokens of the window."""
    offset: Ints
    """``[n + 1]`` where they begin among the ``T``."""
    places: NDArray[np.int64]
    """``[T]`` where they stand among the step's tokens."""

    @classmethod
    def of(cls, step: Step) -> Prompts | None:
        """A step's; None where it has no prompt."""
        stream = step.stream
        rows = np.flatnonzero(step.stream_prefills)
        if not len(rows):
            return None
        tokens = stream.num_tokens[rows]
        offset = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(tokens, out=offset[1:])
        shift = stream.token_start[rows].astype(np.int64) - offset[:-1]
        places = np.repeat(shift, tokens) + np.arange(offset[-1])
        return cls(stream.request[rows], stream.context_end[rows] - tokens, tokens, offset, places)

    def subset(self, windows: NDArray[np.int64]) -> tuple[Prompts, NDArray[np.int64]]:
        """Some of the windows, in any order.

        Args:
            windows: ``[m]`` which.

        Returns:
            The windows by themselves; ``[t]`` where their tokens are among the ``T``.
        """
        tokens = self.tokens[windows]
        offset = np.zeros(len(tokens) + 1, np.int32)
        np.cumsum(tokens, out=offset[1:])
        shift = self.offset[windows].astype(np.int64) - offset[:-1]
        mine = np.repeat(shift, tokens) + np.arange(offset[-1])
        chosen = Prompts(
            self.request[windows], self.first[windows], tokens, offset, self.places[mine]
        )
        return chosen, mine

    def runs(self) -> Ints:
        """``[r + 1]`` first window of each request, then n."""
        begins = np.flatnonzero(np.diff(self.request, prepend=-1))
        return np.append(begins, len(self.request)).astype(np.int32)

    def part(self, begin: int, end: int) -> Prompts:
        """Some of the windows; offsets and places stay as they are."""
        return Prompts(
            self.request[begin:end], self.first[begin:end], self.tokens[begin:end],
            self.offset[begin : end + 1], self.places,
        )  # fmt: skip
