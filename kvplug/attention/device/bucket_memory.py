"""Hash buckets on a GPU; the twin is :mod:`kvplug.index.buckets`.

On CPU a page is hashed when it leaves the local region. Here a key is hashed when it is written: by
then the mean that it is centred by is there, for a request's first window gives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvplug.attention.device.centre import DeviceCentre
from kvplug.attention.device.memory import DeviceMemory
from kvplug.index.planes import draw_planes
from kvplug.kernels.bucket_scores import bucket_masks, bucket_scores
from kvplug.kernels.sign_hash import sign_hash, sign_hash_probes

if TYPE_CHECKING:
    from kvplug.attention.device.plan import DevicePlan, SparseWindows
    from kvplug.attention.device.watchers import BoundLayer
    from kvplug.index.buckets import Buckets
    from kvplug.kernels.far_pages import FarPages
    from kvplug.kernels.paged_attention import PagedCache


class BucketMemory(DeviceMemory):
    """One 64-bit word per token and KV head.

    Args:
        options: The index.
        layer: Whose.
    """

    def __init__(self, options: Buckets, layer: BoundLayer) -> None:
        """Draws the planes and allocates the words."""
        self.shape, device = layer.shape, layer.device
        size = self.shape.num_pages, self.shape.num_kv_heads, self.shape.page
        self.rounds = options.rounds
        self.masks = bucket_masks(options.bits, options.rounds, device)
        self.planes = draw_planes(self.shape).to(device)
        self.centre = layer.own(DeviceCentre)
        self.words = torch.zeros(size, dtype=torch.int64, device=device)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """``[pages, Hk, P]`` int64 words."""
        return (self.words,)

    def write(self, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan) -> None:
        """See :meth:`DeviceMemory.write`."""
        self.centre.firsts.find(plan)
        centred = self.centre.keys[self.centre.firsts.tokens]  # [T, Hk, D]
        torch.sub(keys, centred, out=centred)
        sign_hash(centred, plan.slots, self.planes, self.words)

    def score(
        self, vectors: torch.Tensor, counts: torch.Tensor, windows: SparseWindows, far: FarPages,
        scores: torch.Tensor,
    ) -> None:  # fmt: skip
        """Probes come token by token, all query heads of one together; see the base class."""
        heads = self.shape.num_kv_heads
        pages = far.block_table[:, 0][windows.request.long()].long()
        means = self.centre.queries[pages].unflatten(1, (heads, -1))  # [S, Hk, G, D]
        by_token = vectors.unflatten(2, (-1, means.shape[2]))
        centred = (by_token - means[:, :, None]).flatten(2, 3)  # [S, Hk, R, D]
        probes = vectors.new_empty(vectors.shape[:3], dtype=torch.int64)
        sign_hash_probes(centred, self.planes, probes)
        bucket_scores(self.words, probes, counts, far, self.rounds, self.masks, scores)

    def scratch_bytes(self, probes: int, pages: int) -> int:
        """See :meth:`DeviceMemory.scratch_bytes`."""
        return probes * (4 * self.shape.head_dim + 8) + 4 * pages
