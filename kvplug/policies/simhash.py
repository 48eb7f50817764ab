"""Simhash: 64 sign bits per token, a page scored by its best-matching token.

Random-hyperplane signs (Charikar 2002) used as HashAttention (2412.14468) and HATA use learned
ones. Nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.index.simhash import SimHash as SignHash
from kvplug.policies.base import Policy, Stages
from kvplug.probe.last_activated import LastAndActivatedProbe


@dataclass(frozen=True)
class SimHash(Policy):
    """Sign-hash index, probes from the last and the most activated tokens, top pages."""

    last: int = 4
    """Tokens at the end of a window that probe."""
    active: int = 4
    """Most activated other tokens of a window that probe, per KV head."""

    def __post_init__(self) -> None:
        """Refuses counts that the probe cannot serve."""
        self._probe()

    def _probe(self) -> LastAndActivatedProbe:
        return LastAndActivatedProbe(last=self.last, active=self.active)

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        return Stages(index=SignHash(), probe=self._probe())
