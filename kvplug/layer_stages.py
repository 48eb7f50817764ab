"""The stages as they work on one layer, and what they remember of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplug.pending import PendingTokens
from kvplug.stage import Layer, Memory, Passage

if TYPE_CHECKING:
    import torch

    from kvplug.budget.base import Budget
    from kvplug.index.base import PageIndex
    from kvplug.policies.base import Stages
    from kvplug.probe.base import Probe
    from kvplug.rotary import FixedPositions
    from kvplug.segment.base import Segmenter
    from kvplug.select.base import Select


class LayerStages:
    """The stages as they work on one layer.

    Args:
        stages: The recipe's.
        layer: The layer.
        fixed: Where its stages see queries and keys; None for where they are.
    """

    def __init__(self, stages: Stages, layer: Layer, fixed: FixedPositions | None = None) -> None:
        """Binds every stage."""
        self.fixed = fixed
        assert stages.index is not None
        assert stages.probe is not None
        self.segmenter: Segmenter | None = None
        if stages.segment is not None:
            self.segmenter = stages.segment.for_layer(layer)
        self.index: PageIndex = stages.index.for_layer(layer)
        self.probe: Probe = stages.probe.for_layer(layer)
        self.budget: Budget = stages.budget.for_layer(layer)
        self.select: Select = stages.select.for_layer(layer)
        self.memories: list[Memory] = [*layer.memories.values(), self.index]
        self.watchers = [m for m in self.memories if type(m).watch is not Memory.watch]
        self.beginners = [m for m in self.memories if type(m).begin is not Memory.begin]
        self.sealers = [m for m in self.memories if type(m).seal is not Memory.seal]
        self.forgetters = [m for m in self.memories if type(m).forget is not Memory.forget]
        self.pending = PendingTokens(layer.shape) if self.watchers else None

    def watch(self, passage: Passage, slots: torch.Tensor) -> None:
        """Shows a step to every memory that learns from it, after it forgot what it replaces.

        Args:
            passage: The step, as it passes through the layer.
            slots: ``[T]`` where its keys went.
        """
        for memory in self.forgetters:
            memory.forget(slots)
        for memory in self.watchers:
            memory.watch(passage)

    def nbytes(self) -> float:
        """Bytes that the layer's memories take when every page is in use."""
        return sum(memory.nbytes() for memory in self.memories)
