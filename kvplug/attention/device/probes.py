"""What asks for pages on a GPU: vectors that stand for a window's queries.

They are those of the probes on CPU, :mod:`kvplug.probe`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from kvplug.attention.device.query_statistics import DeviceQueryStatistics
from kvplug.kernels.activation import activation_means
from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.join_probes import ProbeVectors, join_probes
from kvplug.kernels.last_activated import last_activated
from kvplug.kernels.mean_query import mean_query
from kvplug.probe.activation import ActivationProbe
from kvplug.probe.last_activated import LastAndActivatedProbe
from kvplug.probe.mean import MeanProbe
from kvplug.probe.union import UnionProbe

if TYPE_CHECKING:
    from kvplug.attention.device.plan import SparseWindows
    from kvplug.attention.device.watchers import BoundLayer
    from kvplug.kernels.far_pages import FarPages
    from kvplug.probe.base import Probe
    from kvplug.stage import LayerShape


class DeviceProbe(ABC):
    """Reduces the queries of a layer's windows to a few vectors per KV head."""

    @property
    @abstractmethod
    def most(self) -> int:
        """Vectors of a window per query head, at most."""

    @abstractmethod
    def build(self, queries: torch.Tensor, windows: SparseWindows, far: FarPages) -> ProbeVectors:
        """Builds the probes of windows.

        Args:
            queries: ``[T, H, D]`` of the whole step, after the rotary embedding.
            windows: Some of its windows.
            far: Their far pages, and the block table.
        """


class DeviceLastActivated(DeviceProbe):
    """A window's last and most activated queries.

    Args:
        last: Tokens taken from a window's end.
        active: Tokens taken from the rest.
        shape: The layer's geometry.
    """

    def __init__(self, last: int, active: int, shape: LayerShape) -> None:
        """Holds its arguments."""
        self.last, self.active, self.shape = last, active, shape

    @property
    def most(self) -> int:
        """See :attr:`DeviceProbe.most`."""
        return self.last + self.active

    def build(self, queries: torch.Tensor, windows: SparseWindows, far: FarPages) -> ProbeVectors:
        """See :meth:`DeviceProbe.build`."""
        num, shape, bias = len(windows), self.shape, None
        is_decoding = windows.singles == num
        if not is_decoding:
            size = num, shape.num_heads, shape.window
            bias = queries.new_empty(size, dtype=torch.float32)
        found = _empty(queries, num, 1 if is_decoding else self.most, shape, queries.dtype)
        last_activated(_windows_of(queries, windows), self.last, self.active, bias, *found)
        return found


class DeviceMean(DeviceProbe):
    """The mean query of each query head; at decode the query.

    Args:
        shape: The layer's geometry.
    """

    def __init__(self, shape: LayerShape) -> None:
        """Holds its argument."""
        self.shape = shape

    @property
    def most(self) -> int:
        """See :attr:`DeviceProbe.most`."""
        return 1

    def build(self, queries: torch.Tensor, windows: SparseWindows, far: FarPages) -> ProbeVectors:
        """See :meth:`DeviceProbe.build`."""
        found = _empty(queries, len(windows), 1, self.shape, torch.float32)
        mean_query(_windows_of(queries, windows), *found)
        return found


class DeviceActivation(DeviceProbe):
    """The mean query of each query head, weighted by how far tokens stand out.

    Args:
        probe: What was asked for.
        layer: The layer, which then watches its queries.
    """

    def __init__(self, probe: ActivationProbe, layer: BoundLayer) -> None:
        """Asks for the statistics."""
        self.shape, self.statistics = layer.shape, layer.own(DeviceQueryStatistics)
        self.warm_up, self.sharpness = probe.warm_up * layer.shape.window, probe.sharpness
        self.shares = 1 if probe.share == "all" else layer.shape.num_kv_heads

    @property
    def most(self) -> int:
        """See :attr:`DeviceProbe.most`."""
        return 1

    def build(self, queries: torch.Tensor, windows: SparseWindows, far: FarPages) -> ProbeVectors:
        """See :meth:`DeviceProbe.build`."""
        assert windows.before is not None
        num, shape = len(windows), self.shape
        longest = 1 if windows.singles == num else shape.window
        vectors, counts = _empty(queries, num, 1, shape, torch.float32)
        activation_means(
            _windows_of(queries, windows),
            self.statistics.seen(far.block_table, windows.request, windows.before),
            self.warm_up, self.sharpness,
            queries.new_empty((num, shape.num_heads, longest), dtype=torch.float32),
            queries.new_empty((num, self.shares, longest), dtype=torch.float32), vectors,
        )  # fmt: skip
        return ProbeVectors(vectors, counts.fill_(shape.num_heads // shape.num_kv_heads))


class DeviceUnion(DeviceProbe):
    """The vectors of all its probes; at decode the query, which each of them would give.

    Args:
        parts: The probes.
    """

    def __init__(self, parts: list[DeviceProbe]) -> None:
        """Holds its argument."""
        self.parts = parts

    @property
    def most(self) -> int:
        """See :attr:`DeviceProbe.most`."""
        return sum(part.most for part in self.parts)

    def build(self, queries: torch.Tensor, windows: SparseWindows, far: FarPages) -> ProbeVectors:
        """See :meth:`DeviceProbe.build`."""
        first, *others = self.parts
        found = [first.build(queries, windows, far)]
        num = len(windows)
        if windows.singles == num:
            return found[0]
        found += [part.build(queries, windows, far) for part in others]
        heads, dim = found[0].vectors.shape[1], found[0].vectors.shape[3]
        size = num, heads, sum(part.vectors.shape[2] for part in found), dim
        filled = queries.new_empty((len(found) + 1, num), dtype=torch.int32)
        joined = queries.new_empty(size, dtype=torch.float32)
        join_probes(found, joined, filled)
        return ProbeVectors(joined, filled[-1])


def make_probe(probe: Probe | None, layer: BoundLayer) -> DeviceProbe | None:
    """What builds a layer's probes; None where a recipe has none."""
    return None if probe is None else _made(probe, layer)


def _made(probe: Probe, layer: BoundLayer) -> DeviceProbe:
    """See :func:`make_probe`."""
    if isinstance(probe, LastAndActivatedProbe):
        return DeviceLastActivated(probe.last, probe.active, layer.shape)
    if isinstance(probe, ActivationProbe):
        return DeviceActivation(probe, layer)
    if isinstance(probe, UnionProbe):
        return DeviceUnion([_made(part, layer) for part in probe.probes])
    assert isinstance(probe, MeanProbe), "others are refused when an engine starts"
    return DeviceMean(layer.shape)


def _windows_of(queries: torch.Tensor, windows: SparseWindows) -> QueryWindows:
    """The windows as kernels see them."""
    return QueryWindows(queries, windows.token_start, windows.num_tokens)


def _empty(
    queries: torch.Tensor, num: int, most: int, shape: LayerShape, dtype: torch.dtype
) -> ProbeVectors:
    """Memory for ``most`` vectors of each window and query head."""
    group = shape.num_heads // shape.num_kv_heads
    size = num, shape.num_kv_heads, group * most, shape.head_dim
    return ProbeVectors(
        queries.new_empty(size, dtype=dtype), queries.new_empty(num, dtype=torch.int32)
    )
