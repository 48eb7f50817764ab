"""Contract of the index stage: a summary of keys by physical page, and page scores from it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from kvplug.stage import Layer, Memory, Stage

if TYPE_CHECKING:
    import torch

    from kvplug.probe.base import Probes
    from kvplug.step import Step


class Index(Stage):
    """Names a summary of keys, and makes one for each layer."""

    kind = "index"

    @abstractmethod
    def for_layer(self, layer: Layer) -> PageIndex:
        """The layer's summary, empty."""


class PageIndex(Memory):
    """Summary of one layer's keys. State belongs to physical pages and slots (design rule 1)."""

    @abstractmethod
    def write(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Remembers keys; overwrites what their slots held before.

        Args:
            keys: ``[T, Hk, D]`` float32, as they go into the cache.
            slots: ``[T]`` int64, ``page * P + offset``; negative ones are padding and skipped.
        """

    @abstractmethod
    def score(self, probes: Probes, step: Step, scores: torch.Tensor) -> None:
        """Scores every far page of every sparse window, in one call. Higher is better.

        Args:
            probes: Of the step's ``W`` sparse windows.
            step: Windows and page numbers.
            scores: ``[W, Hk, N]`` float32, written: entry ``n`` is logical page
                ``far_begin + n``; entries from ``far_end - far_begin`` on are left alone.
        """

    @property
    def means(self) -> torch.Tensor:
        """``[pages, Hk, D]`` mean key of every page that any window may retrieve.

        Only where the stage gives ``means``.
        """
        raise NotImplementedError

    def bytes_per_token(self) -> float:
        """Bytes of index per token and layer, all KV heads."""
        return self.nbytes() / (self.shape.num_pages * self.shape.page)
