"""Contract of the segment stage: which pages begin an event."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numba import njit

from kvplug.stage import Layer, Memory, Stage

if TYPE_CHECKING:
    from kvplug.step import Step


class Segment(Stage):
    """Cuts the token stream of a request into events, for all layers alike."""

    kind = "segment"
    gives = frozenset({"events"})
    needs_logits: ClassVar[bool] = False
    """Whether it learns from the model's output after every step."""

    @property
    def needs_every_head(self) -> bool:
        """Whether it compares keys of all KV heads, which a tensor-parallel worker has not."""
        return False

    @abstractmethod
    def for_layer(self, layer: Layer) -> Segmenter | None:
        """What learns events; None where there is nothing to learn.

        It works on memories that all layers share. The one of a model's last layer is used.
        """

    def chunk_limit(self, local: int, window: int) -> int | None:
        """Most prompt tokens that one step may take, in whole windows; None for any number.

        Events must be known before their pages can be retrieved, so a stage that learns them from
        a step's output keeps every step within the local region. The limit does not hold for steps
        that stay below ``dense_below``: they retrieve nothing.
        """
        return None


class Segmenter(ABC):
    """Learns the events of every request that a worker serves."""

    @abstractmethod
    def prepare(self, step: Step) -> None:
        """Makes sure that the events of contexts are known that the step may retrieve from.

        Called in every step that goes beyond ``dense_below``, before the model runs.

        Args:
            step: The step; ``step.stream`` has its windows.
        """

    @abstractmethod
    def learn(self, hidden: torch.Tensor, tokens: torch.Tensor, model: Any, step: Step) -> None:
        """Learns from one step's output, after the model ran.

        What it stores for a window may depend on nothing behind that window (design rule 4).

        Args:
            hidden: ``[T, hidden_size]``, what the model's head reads.
            tokens: ``[T]`` the step's token ids.
            model: vLLM's model; ``compute_logits(hidden)`` gives ``[T, V]``.
            step: The step; ``step.stream`` has its windows.
        """


class EventStarts(Memory):
    """Which physical pages begin an event: ``[pages]`` uint8, shared by all layers.

    Marked are boundaries that were found. Two kinds of event starts need no mark: a request's
    first retrievable page, and every ``most_pages``-th page after a start without one between.
    """

    most_pages = 1
    """Pages of the longest event; the segment stage sets it."""

    def __init__(self, layer: Layer) -> None:
        """Starts without boundaries."""
        super().__init__(layer)
        self.starts = torch.zeros(layer.shape.num_pages, dtype=torch.uint8)
        self._starts_host = self.starts.numpy()

    def limit(self, max_tokens: int) -> None:
        """Says how long an event may be: whole pages of ``max_tokens``, and at least one."""
        self.most_pages = max(max_tokens // self.shape.page, 1)

    def forget(self, slots: torch.Tensor) -> None:
        """A page handed to new content begins no event until it is said to."""
        _unmark(slots.numpy(), self.shape.page, self._starts_host)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See the class."""
        return (self.starts,)


@njit(cache=True)
def _unmark(slots, page, starts):  # type: ignore[no-untyped-def]
    """``starts[page] = 0`` for every page whose first slot is written."""
    for token in range(slots.shape[0]):
        slot = slots[token]
        if slot >= 0 and slot % page == 0:
            starts[slot // page] = 0
