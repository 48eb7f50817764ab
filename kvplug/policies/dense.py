"""Dense: attend to everything. The oracle that every recipe is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.policies.base import Policy, Stages


@dataclass(frozen=True)
class Dense(Policy):
    """Every window takes the platform's own path; output equals stock vLLM's to the bit."""

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        return Stages(index=None, probe=None, always_dense=True)
