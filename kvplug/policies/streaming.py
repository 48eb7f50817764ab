"""Streaming: sinks and the local region only (StreamingLLM, Xiao et al. 2023, 2309.17453).

The floor that every recipe must beat: it retrieves nothing. Keys keep their original positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.budget.fixed import NoBudget
from kvplug.policies.base import Policy, Stages


@dataclass(frozen=True)
class Streaming(Policy):
    """No far pages, whatever the budget."""

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        return Stages(index=None, probe=None, budget=NoBudget())
