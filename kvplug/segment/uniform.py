"""Uniform events: runs of pages of one length, without looking at what they hold."""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.errors import KvplugError
from kvplug.segment.base import EventStarts, Segment
from kvplug.stage import Layer


@dataclass(frozen=True)
class Uniform(Segment):
    """No boundaries: every event has ``max_tokens``, counted from the first retrievable page."""

    name = "uniform"

    max_tokens: int = 128
    """Tokens of an event, rounded down to pages, at least one."""

    def __post_init__(self) -> None:
        """Refuses empty events."""
        if self.max_tokens < 1:
            raise KvplugError(
                f"segment {self.name!r} needs max_tokens >= 1, not {self.max_tokens}."
            )

    def for_layer(self, layer: Layer) -> None:
        """See :meth:`Segment.for_layer`: there is nothing to learn."""
        layer.shared(EventStarts).limit(self.max_tokens)
