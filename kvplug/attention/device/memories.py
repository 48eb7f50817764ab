"""What a layer remembers for each index that is served on GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplug.attention.device.bucket_memory import BucketMemory
from kvplug.attention.device.chunk_memory import ChunkMemory
from kvplug.attention.device.memory import (
    BoundMemory,
    ChannelMemory,
    DeviceMemory,
    SignMemory,
)
from kvplug.attention.device.representative_memory import RepresentativeMemory
from kvplug.index.buckets import Buckets
from kvplug.index.channels import Channels
from kvplug.index.chunk_mean import ChunkMean
from kvplug.index.minmax import MinMax
from kvplug.index.representative import Representative
from kvplug.index.simhash import SimHash

if TYPE_CHECKING:
    from kvplug.attention.device.watchers import BoundLayer
    from kvplug.index.base import Index


def make_memory(index: Index | None, layer: BoundLayer) -> DeviceMemory | None:
    """What a layer remembers for an index; None where a recipe has none."""
    where = layer.shape, layer.device
    if isinstance(index, Channels):
        return ChannelMemory(index.bits, *where)
    if isinstance(index, SimHash):
        return SignMemory(*where)
    if isinstance(index, MinMax):
        return BoundMemory(*where)
    if isinstance(index, ChunkMean):
        return ChunkMemory(index, *where)
    if isinstance(index, Representative):
        return RepresentativeMemory(index, layer)
    if isinstance(index, Buckets):
        return BucketMemory(index, layer)
    return None
