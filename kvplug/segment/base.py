"""Contract of the segment stage: which pages begin an event."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from kvplug.stage import Layer, Memory, Stage

if TYPE_CHECKING:
    from kvplug.step import Step


class Segment(Stage):
    """Cuts the token stream of a request into events, for all layers alike."""

    kind = "segment"
    gives = frozenset({"events"})
    needs_logits: ClassVar[bool] = False
    """Whether :meth:`learn` must be called with the model's output after every step."""

    @abstractmethod
    def for_layer(self, layer: Layer) -> Segment:
        """What segments, the same for every layer; its memories are shared ones."""

    def chunk_limit(self, local: int, window: int) -> int | None:
        """Most prompt tokens that one step may take, in whole windows; None for any number.

        Events must be known before their pages can be retrieved, so a stage that learns them from
        a step's output keeps every step within the local region.
        """
        return None

    def learn(self, hidden: torch.Tensor, tokens: torch.Tensor, model: object, step: Step) -> None:
        """Learns from one step's output; called after the model ran, only if ``needs_logits``.

        Args:
            hidden: ``[T, hidden_size]``, what the model's head reads.
            tokens: ``[T]`` the step's token ids.
            model: vLLM's model; ``compute_logits(hidden)`` gives ``[T, V]``.
            step: The step's windows.
        """
        raise NotImplementedError


class EventStarts(Memory):
    """Which physical pages begin an event: ``[pages]`` uint8, shared by all layers."""

    def __init__(self, layer: Layer) -> None:
        """Starts with one event a request."""
        super().__init__(layer)
        self.starts = torch.zeros(layer.shape.num_pages, dtype=torch.uint8)

    def write(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """A page handed to new content begins no event until it is said to."""
        first = slots[slots % self.shape.page == 0]
        self.starts[first[first >= 0] // self.shape.page] = 0

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See the class."""
        return (self.starts,)
