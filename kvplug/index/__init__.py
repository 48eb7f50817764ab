"""Index stage: what is remembered of keys, by physical page and slot, to score pages."""

from __future__ import annotations

from kvplug.index.base import Index
from kvplug.index.buckets import Buckets
from kvplug.index.channels import Channels
from kvplug.index.chunk_mean import ChunkMean
from kvplug.index.minmax import MinMax
from kvplug.index.representative import Representative
from kvplug.index.simhash import SimHash
from kvplug.registry import Registry, registry_of

INDEXES: Registry[type[Index]] = registry_of(
    "index", Buckets, Channels, ChunkMean, MinMax, Representative, SimHash
)
