"""What a layer remembers of its keys on a GPU: written as keys come, by slot, and scored by page.

On CPU the same is summarised page by page, when a page leaves the local region. Here the host does
not know pages, so keys are summarised as they are written, or when they fill a page, or, where
queries have a say in it, by the device before it scores (:mod:`.local_mass`); what is stored of a
page that a window may retrieve is the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from kvplug.index.planes import draw_planes
from kvplug.kernels.bound_scores import bound_scores
from kvplug.kernels.channel_choice import channel_choice
from kvplug.kernels.channel_codes import channel_codes
from kvplug.kernels.channel_probes import PLANES, channel_probes
from kvplug.kernels.channel_scores import ChannelScratch, channel_scores
from kvplug.kernels.hash_scores import Several, hash_scores
from kvplug.kernels.page_statistics import filled_page_statistics
from kvplug.kernels.sign_hash import sign_hash, sign_hash_probes

if TYPE_CHECKING:
    from kvplug.attention.device.plan import DevicePlan, SparseWindows
    from kvplug.kernels.far_pages import FarPages
    from kvplug.kernels.paged_attention import PagedCache
    from kvplug.stage import LayerShape


class DeviceMemory(ABC):
    """Of one layer, by physical page and slot (design rule 1)."""

    chunk_pages = 0
    """Pages of the chunks whose ends it must know of (:attr:`DevicePlan.chunks`); 0: of none."""

    @property
    @abstractmethod
    def state(self) -> tuple[torch.Tensor, ...]:
        """Its tensors, physical page first."""

    @abstractmethod
    def write(self, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan) -> None:
        """Learns a step's new keys, which are in the cache.

        Args:
            keys: ``[T, Hk, D]``.
            cache: The layer's.
            plan: The step.
        """

    def begin(self, pages: torch.Tensor, cache: PagedCache) -> None:  # noqa: B027, few have any
        """Learns what there is to learn from contexts' first tokens, when all are there.

        Args:
            pages: ``[m, n]`` int32 first pages of contexts.
            cache: The layer's.
        """

    @abstractmethod
    def score(
        self, vectors: torch.Tensor, counts: torch.Tensor, windows: SparseWindows, far: FarPages,
        scores: torch.Tensor,
    ) -> None:  # fmt: skip
        """Scores every far page of every window.

        Args:
            vectors: ``[S, Hk, R, D]`` probes.
            counts: ``[S]`` int32 probes of each window.
            windows: The windows.
            far: Their far pages.
            scores: ``[S, Hk, N]`` float32, written.
        """

    @abstractmethod
    def scratch_bytes(self, probes: int, pages: int) -> int:
        """Bytes of scratch that scoring takes, per window and KV head.

        Args:
            probes: R.
            pages: N.
        """

    def nbytes(self) -> int:
        """Bytes that it takes, whether pages are in use or not."""
        return sum(tensor.nbytes for tensor in self.state)


class SignMemory(DeviceMemory):
    """64 sign bits per token and KV head; the twin is :mod:`kvplug.index.simhash`.

    Args:
        shape: The layer's geometry.
        device: Where.
    """

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        """Draws the planes and allocates the words."""
        size = shape.num_pages, shape.num_kv_heads, shape.page
        self.planes = draw_planes(shape).to(device)
        self.words = torch.zeros(size, dtype=torch.int64, device=device)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """``[pages, Hk, P]`` int64 words."""
        return (self.words,)

    def write(self, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan) -> None:
        """See :meth:`DeviceMemory.write`."""
        sign_hash(keys, plan.slots, self.planes, self.words)

    def score(
        self, vectors: torch.Tensor, counts: torch.Tensor, windows: SparseWindows, far: FarPages,
        scores: torch.Tensor,
    ) -> None:  # fmt: skip
        """See :meth:`DeviceMemory.score`."""
        probes = vectors.new_empty(vectors.shape[:3], dtype=torch.int64)
        sign_hash_probes(vectors, self.planes, probes)
        several = None
        if windows.singles < len(windows):
            size = (*probes.shape, scores.shape[2])
            several = Several(
                windows.num_tokens > 1, probes.new_empty(size, dtype=torch.uint8),
                probes.new_empty(probes.shape, dtype=torch.int32),
            )  # fmt: skip
        hash_scores(self.words, probes, counts, far, scores, several)

    def scratch_bytes(self, probes: int, pages: int) -> int:
        """See :meth:`DeviceMemory.scratch_bytes`."""
        return (probes + 4) * pages


class ChannelMemory(DeviceMemory):
    """Channel codes, and what they mean on contexts' first pages; see :mod:`kvplug.index.channels`.

    Args:
        bits: Of a token's code.
        shape: The layer's geometry.
        device: Where.
    """

    def __init__(self, bits: int, shape: LayerShape, device: torch.device) -> None:
        """Allocates."""
        pages, heads, channels = shape.num_pages, shape.num_kv_heads, bits // 2
        self.scale, self.first_pages = shape.scale, first_pages(shape)
        self.codes = torch.zeros(
            (pages, heads, bits // 64, shape.page), dtype=torch.int64, device=device
        )
        self.chosen = torch.zeros((pages, heads, channels), dtype=torch.int16, device=device)
        self.scales = torch.zeros((pages, heads, 2, channels), device=device)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """Codes; channels, means and deviations on first pages."""
        return (self.codes, self.chosen, self.scales)

    def write(self, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan) -> None:
        """Encodes, for contexts that begin with their channels; see the base class."""
        if len(plan.begun):
            pages = plan.block_table.index_select(0, plan.begun)
            self.begin(pages[:, : self.first_pages].contiguous(), cache)
        channel_codes(keys, plan.slots, plan.firsts, self.chosen, self.scales, self.codes)

    def begin(self, pages: torch.Tensor, cache: PagedCache) -> None:
        """Chooses the channels of contexts and encodes their first tokens; see the base class."""
        channels = self.chosen, self.scales
        first = cache.keys[pages.long()].flatten(1, 2)  # [m, n * P, Hk, D]
        channel_choice(first, pages[:, 0].contiguous(), *channels)
        page = first.shape[1] // self.first_pages
        slots = pages.long()[:, :, None] * page + torch.arange(page, device=pages.device)
        firsts = pages[:, 0].repeat_interleave(first.shape[1])
        channel_codes(first.flatten(0, 1), slots.flatten(), firsts, *channels, self.codes)

    def score(
        self, vectors: torch.Tensor, counts: torch.Tensor, windows: SparseWindows, far: FarPages,
        scores: torch.Tensor,
    ) -> None:  # fmt: skip
        """See :meth:`DeviceMemory.score`."""
        size, words = vectors.shape[:3], self.codes.shape[2]
        asked = vectors.new_empty((*size, words, PLANES + 1), dtype=torch.int64)
        units = vectors.new_empty(size, dtype=torch.float32)
        channel_probes(
            vectors, counts, far, self.chosen, self.scales, self.scale, asked, units
        )  # fmt: skip
        scratch = ChannelScratch(
            scores.new_empty((*size, scores.shape[2])), scores.new_empty(size)
        )  # fmt: skip
        channel_scores(self.codes, asked, units, counts, far, scratch, scores)

    def scratch_bytes(self, probes: int, pages: int) -> int:
        """See :meth:`DeviceMemory.scratch_bytes`."""
        return (probes + 1) * pages * 4


class BoundMemory(DeviceMemory):
    """Least and largest key of whole pages, in every dimension; see :mod:`kvplug.index.minmax`.

    A page is bounded when its last slot is written, from the keys in the cache: those before may
    have come in earlier steps. Until then it says what it said of other keys, which nobody asks: no
    window retrieves a page that its own context has not filled.

    Args:
        shape: The layer's geometry.
        device: Where.
    """

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        """Allocates."""
        size = shape.num_pages, shape.num_kv_heads, 2, shape.head_dim
        self.scale = shape.scale
        self.bounds = torch.zeros(size, dtype=torch.bfloat16, device=device)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """``[pages, Hk, 2, D]`` bfloat16, minima, then maxima."""
        return (self.bounds,)

    def write(self, keys: torch.Tensor, cache: PagedCache, plan: DevicePlan) -> None:
        """See :meth:`DeviceMemory.write`."""
        filled_page_statistics(cache.keys, plan.slots, bounds=self.bounds)

    def score(
        self, vectors: torch.Tensor, counts: torch.Tensor, windows: SparseWindows, far: FarPages,
        scores: torch.Tensor,
    ) -> None:  # fmt: skip
        """See :meth:`DeviceMemory.score`."""
        bound_scores(self.bounds, vectors, counts, far, self.scale, scores)

    def scratch_bytes(self, probes: int, pages: int) -> int:
        """See :meth:`DeviceMemory.scratch_bytes`."""
        return pages * 4


def first_pages(shape: LayerShape) -> int:
    """Pages of a context that say which channels matter, as on CPU."""
    return max(min(shape.window, shape.local) // shape.page, 1)
