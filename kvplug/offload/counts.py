"""What hot pools count."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class PoolCounts:
    """What a pool has done since it was made."""

    hits: int = 0
    """Pages of single KV heads that were there when a call asked for them."""
    misses: int = 0
    """Those that had to be copied in."""
    evictions: int = 0
    """Those that gave way."""
    bytes_read: int = 0
    """From the cold store."""
    bytes_written: int = 0
    """Of new keys and values, which go to the cold store."""
    failed: int = 0
    """Pages that could not be read."""
    prefetched_last: int = 0
    """Pages of single KV heads that were read ahead because the last step attended to them."""
    prefetched_events: int = 0
    """Likewise, because they lie beside what the step attends to."""
    prefetched_next_layer: int = 0
    """Likewise, because the layer before attends to them."""
    prefetch_hits_last: int = 0
    """Those of the first kind that were used before they gave way."""
    prefetch_hits_events: int = 0
    """Of the second."""
    prefetch_hits_next_layer: int = 0
    """Of the third."""
    turns: int = 0
    """Calls of attention; more than steps where a step did not fit at once."""
    stall_s: float = 0.0
    """Seconds that attention waited for pages."""

    def __add__(self, other: PoolCounts) -> PoolCounts:
        """Sums, for all layers together."""
        names = [field.name for field in fields(self)]
        return PoolCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})
