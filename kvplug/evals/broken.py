"""A recipe that is wrong on purpose: pages at random. The lab must see it.

It is declared as the entry point ``random-pages``, as a recipe of another package would be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvplug.index.base import Index, PageIndex
from kvplug.policies.base import Policy, Stages
from kvplug.probe.mean import MeanProbe
from kvplug.stage import Layer

if TYPE_CHECKING:
    import torch

    from kvplug.probe.base import Probes
    from kvplug.step import Step


@dataclass(frozen=True)
class RandomPages(Policy):
    """Pages by a score that knows nothing of queries and keys."""

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        return Stages(index=RandomScores(), probe=MeanProbe())


@dataclass(frozen=True)
class RandomScores(Index):
    """An index that holds nothing."""

    name = "random"

    def for_layer(self, layer: Layer) -> PageIndex:
        """See :meth:`Index.for_layer`."""
        return _Scores(layer)


class _Scores(PageIndex):
    """Scores follow from layer, head, page and the window's end alone, so runs repeat."""

    def score(self, probes: Probes, step: Step, scores: torch.Tensor) -> None:
        """See :meth:`PageIndex.score`."""
        windows = step.windows
        for w, row in enumerate(step.sparse_windows):
            key = (self.shape.seed, self.shape.layer, int(windows.context_end[row]))
            far = int(windows.far_end[row] - windows.far_begin[row])
            draw = np.random.default_rng(key).random((scores.shape[1], far), np.float32)
            scores[w, :, :far].numpy()[:] = draw
