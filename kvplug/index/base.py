"""Contract of the index stage: a summary of keys by physical page, and page scores from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from kvplug.probe.base import Probes
    from kvplug.step import Step


class IndexShape(NamedTuple):
    """Where an index lives and how large it is."""

    num_pages: int
    """Physical pages of the cache."""
    num_kv_heads: int
    """KV heads on this worker, Hk."""
    page: int
    """Tokens per page, P."""
    head_dim: int
    """D."""
    layer: int
    """Number of the layer in the model; hash planes differ by layer."""
    first_kv_head: int
    """Model-wide number of this worker's first KV head; hash planes differ by head."""
    seed: int
    """The user's seed."""


class PageIndex(ABC):
    """Summary of one layer's keys. State belongs to physical pages and slots (design rule 1).

    Args:
        shape: Geometry, layer and seed.
    """

    def __init__(self, shape: IndexShape) -> None:
        """Holds the shape; subclasses allocate."""
        self.shape = shape

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
    @abstractmethod
    def state(self) -> torch.Tensor:
        """The tensor that holds the summary, physical page first."""

    def bytes_per_token(self) -> float:
        """Bytes of index per token and layer, all KV heads."""
        return self.state.nbytes / (self.shape.num_pages * self.shape.page)
