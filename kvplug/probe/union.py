"""Several probes at once: a page counts when any of them finds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvplug.errors import KvplugError
from kvplug.probe.base import Probe, Probes
from kvplug.stage import Layer

if TYPE_CHECKING:
    from kvplug.step import Step
    from kvplug.workspace import Workspace


@dataclass(frozen=True)
class UnionProbe(Probe):
    """The vectors of all its probes, one after the other."""

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
        parts: list[Probes] = []
        for number, probe in enumerate(self.probes):
            vectors, counts = probe.build(queries, num_kv_heads, step, workspace)
            kept = workspace.take(f"probe.part{number}", tuple(vectors.shape), torch.float32)
            parts.append(Probes(kept.copy_(vectors), counts))
        counts = torch.stack([part.counts for part in parts]).sum(0, dtype=torch.int32)
        windows, _, _, dim = parts[0].vectors.shape
        shape = (windows, num_kv_heads, int(counts.max()), dim)
        joined = workspace.take("probe.joined", shape, torch.float32)
        for w in range(windows):
            filled = 0
            for part in parts:
                count = int(part.counts[w])
                joined[w, :, filled : filled + count] = part.vectors[w, :, :count]
                filled += count
        return Probes(joined, counts)
