"""InfLLM: pages known by their most attended keys (Xiao et al. 2024, arXiv 2402.04617).

Deviations: far keys keep their own positions, where the paper puts all of them at one distance, so
a context longer than the model was trained for is no better served than by full attention; the
attention that picks a page's keys comes from every 32nd query and from a softmax over the local
region alone (see :mod:`kvplug.index.local_mass`); a page (``--block-size``) takes the place of the
paper's block of 128 tokens, and a window that of its 512 queries; the heads of one worker share a
list, so with tensor parallelism each worker has its own; nothing is moved to host memory here.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.index.representative import Representative
from kvplug.policies.base import Policy, Stages
from kvplug.probe.mean import MeanProbe


@dataclass(frozen=True)
class InfLlm(Policy):
    """Representative keys, the mean query of each head, a fixed number of top pages."""

    top: int = 4
    """Keys that represent a page, per KV head."""
    heads: str = "all"
    """``all`` KV heads share one list of pages, as in the paper, or ``each`` has its own."""

    def __post_init__(self) -> None:
        """Refuses what the index cannot serve."""
        self._index()

    def _index(self) -> Representative:
        return Representative(top=self.top, heads=self.heads)

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        return Stages(index=self._index(), probe=MeanProbe())
