"""Several probes at once: a page counts when any of them finds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.errors import KvplugError
from kvplug.probe.base import Probe, Probes, queries_themselves
from kvplug.stage import Layer

if TYPE_CHECKING:
    from kvplug.step import Step
    from kvplug.workspace import Workspace

LANES = 16
"""Floats in a vector register, to estimate work."""


@dataclass(frozen=True)
class UnionProbe(Probe):
    """The vectors of all its probes, one after the other.

    What a probe adds to a window is left out where the first gave just the same: at decode, where
    most probes are the query itself, a union costs no more than one of them.
    """

    name = "union"
    probes: tuple[Probe, ...] = ()

    def __post_init__(self) -> None:
        """Refuses an empty union."""
        if not self.probes:
            raise KvplugError("A list of probes must name at least one.")

    def for_layer(self, layer: Layer) -> Probe:
        """Binds every part."""
        return UnionProbe(tuple(probe.for_layer(layer) for probe in self.probes))

    def build(
        self, queries: torch.Tensor, num_kv_heads: int, step: Step, workspace: Workspace
    ) -> Probes:
        """See :meth:`Probe.build`."""
        decoded = queries_themselves(queries, num_kv_heads, step)
        if decoded is not None and all(probe.query_at_decode for probe in self.probes):
            return decoded
        parts: list[Probes] = []
        for number, probe in enumerate(self.probes):
            vectors, counts = probe.build(queries, num_kv_heads, step, workspace)
            # Probes build in the same buffer, so each is moved out of the next one's way.
            kept = workspace.take(f"probe.part{number}", tuple(vectors.shape), torch.float32)
            parts.append(Probes(kept.copy_(vectors), counts))
        windows, _, _, dim = parts[0].vectors.shape
        most = sum(part.vectors.shape[2] for part in parts)
        joined = workspace.take("probe.joined", (windows, num_kv_heads, most, dim), torch.float32)
        filled = torch.zeros(windows, dtype=torch.int32)
        for vectors, counts in parts:
            work = vectors.numel() // LANES
            _append(work, vectors.numpy(), counts.numpy(), joined.numpy(), filled.numpy())
        return Probes(joined, filled)


@njit(cache=True)
def _begins_with(joined, vectors, count):  # type: ignore[no-untyped-def]
    """Whether the first ``count`` of two rows of vectors ``[Hk, R, D]`` are equal."""
    for head in range(vectors.shape[0]):
        for r in range(count):
            for d in range(vectors.shape[2]):
                if joined[head, r, d] != vectors[head, r, d]:
                    return False
    return True


@compiled()
def _append(vectors, counts, joined, filled):  # type: ignore[no-untyped-def]
    """Appends each window's vectors to ``joined``, unless they are what stands there first."""
    for w in prange(vectors.shape[0]):
        count, start = counts[w], filled[w]
        if start >= count and _begins_with(joined[w], vectors[w], count):
            continue
        joined[w, :, start : start + count] = vectors[w, :, :count]
        filled[w] = start + count


def union_reference(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Twin of :meth:`UnionProbe.build` in plain torch.

    Args:
        parts: Of each probe, one ``[Hk, R_w, D]`` per window.

    Returns:
        One ``[Hk, R_w, D]`` per window.
    """
    joined = []
    for window in zip(*parts, strict=True):
        row = window[0]
        for vectors in window[1:]:
            count = vectors.shape[1]
            if row.shape[1] < count or not torch.equal(row[:, :count], vectors):
                row = torch.cat([row, vectors], 1)
        joined.append(row)
    return joined
