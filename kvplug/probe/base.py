"""Contract of the probe stage: vectors that stand for a window's queries."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from kvplug.stage import Layer, Stage

if TYPE_CHECKING:
    from kvplug.step import Step
    from kvplug.workspace import Workspace


class Probes(NamedTuple):
    """Probe vectors of a step's ``W`` sparse windows (``step.sparse_windows``, in its order)."""

    vectors: torch.Tensor
    """``[W, Hk, R, D]`` float32; rows from ``counts`` on are undefined."""
    counts: torch.Tensor
    """``[W]`` int32, how many of the R vectors each window has; at least 1."""


class Probe(Stage):
    """Reduces the queries of a window to a few vectors per KV head."""

    kind = "probe"
    query_at_decode: ClassVar[bool] = False
    """Whether the probe of a window of one token is that token's query, of each query head."""

    def for_layer(self, layer: Layer) -> Probe:
        """What builds the layer's probes: itself, unless it keeps state."""
        return self

    @abstractmethod
    def build(
        self, queries: torch.Tensor, num_kv_heads: int, step: Step, workspace: Workspace
    ) -> Probes:
        """Builds the probes of every sparse window in one call.

        The result depends on nothing but the window's own queries and what its layer remembers of
        the windows before it (design rule 4), is owned by ``workspace`` and stays valid until the
        next call.

        Args:
            queries: ``[T, H, D]`` float32, after the rotary embedding. Query head ``h`` belongs
                to KV head ``h // (H // Hk)``.
            num_kv_heads: Hk.
            step: The step's windows.
            workspace: Where buffers live.
        """


def queries_themselves(queries: torch.Tensor, num_kv_heads: int, step: Step) -> Probes | None:
    """The probes of a step in which every token is a sparse window of its own, if it is such.

    A shortcut for decode, where a probe with ``query_at_decode`` needs no copy.

    Args:
        queries: See :meth:`Probe.build`.
        num_kv_heads: Hk.
        step: The step's windows.
    """
    tokens, heads, dim = queries.shape
    if len(step.sparse_windows) != tokens:
        return None
    group = heads // num_kv_heads
    vectors = queries.view(tokens, num_kv_heads, group, dim)
    return Probes(vectors, torch.full((tokens,), group, dtype=torch.int32))
