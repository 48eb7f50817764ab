"""What asks for pages on a GPU: vectors that stand for a window's queries.

They are those of the probes on CPU, :mod:`kvplug.probe`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvplug.kernels.distance import QueryWindows
from kvplug.kernels.last_activated import last_activated
from kvplug.kernels.mean_query import mean_query
from kvplug.probe.last_activated import LastAndActivatedProbe
from kvplug.probe.mean import MeanProbe

if TYPE_CHECKING:
    from kvplug.attention.device.plan import SparseWindows
    from kvplug.attention.device.watchers import BoundLayer
    from kvplug.kernels.far_pages import FarPages
    from kvplug.probe.base import Probe
    from kvplug.stage import LayerShape


class DeviceProbes(NamedTuple):
    """Of the ``S`` windows of a call."""

    vectors: torch.Tensor
    """``[S, Hk, R, D]`` of the queries' dtype or float32; rows from ``counts`` on are undefined."""
    counts: torch.Tensor
    """``[S]`` int32, how many of the R vectors each window has."""


class DeviceProbe(ABC):
    """Reduces the queries of a layer's windows to a few vectors per KV head."""

    @property
    @abstractmethod
    def most(self) -> int:
        """Vectors of a window per query head, at most."""

    @abstractmethod
    def build(self, queries: torch.Tensor, windows: SparseWindows, far: FarPages) -> DeviceProbes:
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

    def build(self, queries: torch.Tensor, windows: SparseWindows, far: FarPages) -> DeviceProbes:
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

    def build(self, queries: torch.Tensor, windows: SparseWindows, far: FarPages) -> DeviceProbes:
        """See :meth:`DeviceProbe.build`."""
        found = _empty(queries, len(windows), 1, self.shape, torch.float32)
        mean_query(_windows_of(queries, windows), *found)
        return found


def make_probe(probe: Probe | None, layer: BoundLayer) -> DeviceProbe | None:
    """What builds a layer's probes; None where a recipe has none."""
    if isinstance(probe, LastAndActivatedProbe):
        return DeviceLastActivated(probe.last, probe.active, layer.shape)
    if isinstance(probe, MeanProbe):
        return DeviceMean(layer.shape)
    return None


def _windows_of(queries: torch.Tensor, windows: SparseWindows) -> QueryWindows:
    """The windows as kernels see them."""
    return QueryWindows(queries, windows.token_start, windows.num_tokens)


def _empty(
    queries: torch.Tensor, num: int, most: int, shape: LayerShape, dtype: torch.dtype
) -> DeviceProbes:
    """Memory for ``most`` vectors of each window and query head."""
    group = shape.num_heads // shape.num_kv_heads
    size = num, shape.num_kv_heads, group * most, shape.head_dim
    return DeviceProbes(
        queries.new_empty(size, dtype=dtype), queries.new_empty(num, dtype=torch.int32)
    )
