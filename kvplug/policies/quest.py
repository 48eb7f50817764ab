"""Quest: per-page key bounds, scored by every query head (Tang et al. 2024, 2406.10774).

Deviations: prefill windows retrieve too (the paper is decode-only), probed by the mean query of
each query head; a page's score for a KV head is the largest over the head's group.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.index.minmax import MinMax
from kvplug.policies.base import Policy, Stages
from kvplug.probe.mean import MeanProbe


@dataclass(frozen=True)
class Quest(Policy):
    """Min/max index, mean probe, top pages."""

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        return Stages(index=MinMax(), probe=MeanProbe())
