"""HAX-inspired: hash buckets and key selection, with nothing trained (after arXiv 2507.00449)."""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.index.buckets import Buckets
from kvplug.policies.base import Policy, Stages
from kvplug.probe.last_activated import LastAndActivatedProbe
from kvplug.select.union import Union


@dataclass(frozen=True)
class Hax(Policy):
    """Bucket index, probes from the last and the most activated tokens, union select."""

    bits: int = 2
    """Sign bits of a bucket's number."""
    rounds: int = 32
    """Independent hash rounds; ``bits * rounds`` is at most 64."""
    split: float = 0.5
    """Share of a row's pages, 0 to 1, that goes to hash hits; key selection takes the rest."""
    last: int = 4
    """Tokens at the end of a window that probe."""
    active: int = 4
    """Most activated other tokens of a window that probe, per KV head."""

    def __post_init__(self) -> None:
        """Refuses what a stage refuses."""
        self.stages()

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        return Stages(
            index=Buckets(bits=self.bits, rounds=self.rounds),
            probe=LastAndActivatedProbe(last=self.last, active=self.active),
            select=Union(split=self.split),
        )
