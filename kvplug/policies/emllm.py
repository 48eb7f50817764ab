"""EM-LLM: events by surprise, whole and with their neighbours (Fountas et al. 2025, 2407.09450).

Deviations: those of :mod:`kvplug.segment.surprise`, :mod:`kvplug.select.events` and
:mod:`kvplug.index.local_mass`. Representative keys belong to pages, and an event is known by its
best page. Keys keep their positions, where the paper puts every retrieved event at one distance, so
nothing is extrapolated past the trained context. The authors' configurations leave contiguity out;
here it is on, with the share that they give it where they use it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.index.representative import Representative
from kvplug.policies.base import Policy, Stages
from kvplug.probe.mean import MeanProbe
from kvplug.segment.surprise import Surprise
from kvplug.select.events import Events


@dataclass(frozen=True)
class EmLlm(Policy):
    """Surprise events, representative keys, mean probe, events and neighbours."""

    gamma: float = 1.0
    """Standard deviations above the mean surprise at which an event begins."""
    min_tokens: int = 8
    """Of an event: boundaries nearer to the last one are dropped."""
    max_tokens: int = 128
    """Longest event, rounded down to pages."""
    refine: str = "none"
    """What moves boundaries: ``none``, ``modularity`` or ``conductance``."""
    contiguity: float = 0.3
    """Share of the budget for the neighbours of retrieved events."""
    top: int = 4
    """Keys that represent a page, per KV head."""

    def __post_init__(self) -> None:
        """Refuses what the stages refuse."""
        self.stages()

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        segment = Surprise(
            gamma=self.gamma,
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
            refine=self.refine,
        )
        return Stages(
            index=Representative(top=self.top, heads="all"),
            probe=MeanProbe(),
            select=Events(contiguity=self.contiguity),
            segment=segment,
        )
