"""Representative keys on a GPU; the twin is :mod:`kvplug.index.representative`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplug.attention.device.local_mass import DeviceLocalMass
from kvplug.attention.device.memory import DeviceMemory
from kvplug.kernels.representative_scores import Ranking, representative_scores

if TYPE_CHECKING:
    import torch

    from kvplug.attention.device.plan import DevicePlan, SparseWindows
    from kvplug.attention.device.watchers import BoundLayer
    from kvplug.index.representative import Representative
    from kvplug.kernels.far_pages import FarPages
    from kvplug.kernels.paged_attention import PagedCache


class RepresentativeMemory(DeviceMemory):
    """One bfloat16 vector per page and KV head, settled by the layer's local mass.

    Args:
        options: The index.
        layer: Whose.
    """

    def __init__(self, options: Representative, layer: BoundLayer) -> None:
        """Asks the layer's local mass for the vectors."""
        self.scale = layer.shape.scale
        self.ranking = Ranking(
            options.metric == "cosine", options.heads == "all", options.reduce == "sum"
        )
        self.vectors = layer.own(DeviceLocalMass).keep_representatives(options.top)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """``[pages, Hk, D]`` bfloat16 representative keys; of settled pages only."""
        return (self.vectors,)

    def write(self, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan) -> None:
        """Learns nothing of new keys: their pages are settled later."""

    def score(
        self, vectors: torch.Tensor, counts: torch.Tensor, windows: SparseWindows, far: FarPages,
        scores: torch.Tensor,
    ) -> None:  # fmt: skip
        """See :meth:`DeviceMemory.score`."""
        given = self.vectors, vectors, counts, far, self.scale
        representative_scores(*given, self.ranking, scores)

    def scratch_bytes(self, probes: int, pages: int) -> int:
        """See :meth:`DeviceMemory.scratch_bytes`."""
        return 4 * pages
