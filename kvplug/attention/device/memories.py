"""What a layer remembers for each index that is served on GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvplug.attention.device.chunk_memory import ChunkMemory
from kvplug.attention.device.memory import (
    BoundMemory,
    ChannelMemory,
    DeviceMemory,
    SignMemory,
)
from kvplug.index.channels import Channels
from kvplug.index.chunk_mean import ChunkMean
from kvplug.index.minmax import MinMax
from kvplug.index.simhash import SimHash

if TYPE_CHECKING:
    import torch

    from kvplug.index.base import Index
    from kvplug.stage import LayerShape


def make_memory(
    index: Index | None, shape: LayerShape, device: torch.device
) -> DeviceMemory | None:
    """What a layer remembers for an index; None where a recipe has none."""
    if isinstance(index, Channels):
        return ChannelMemory(index.bits, shape, device)
    if isinstance(index, SimHash):
        return SignMemory(shape, device)
    if isinstance(index, MinMax):
        return BoundMemory(shape, device)
    if isinstance(index, ChunkMean):
        return ChunkMemory(index, shape, device)
    return None
