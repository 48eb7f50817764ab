"""HCAM: memory as chunks, found by their mean key (Lampinen et al. 2021, arXiv 2105.14039).

HCAM is trained: a chunk's key is the mean of learned embeddings, and the model learns to read it.
What is kept needs no training: a memory is cut into chunks of equal length, a chunk is found by
its mean key, the open chunk is not retrievable, and attention goes on inside the best chunks only.

Deviations: keys are the model's own, after the rotary embedding, and so are the heads; there are
two levels, chunks of pages and pages, because the unit that is attended is a page, and pages of a
chunk that is not open are ranked by their own means; every layer and KV head retrieves for itself;
prefill windows are probed by the mean query of each query head. The paper's output, pages weighted
by the softmax of their summaries, is the option ``merge: "coarse"``; by default one softmax over
everything attended weighs them. ``coarse`` counts a page as ``tokens * exp(logit of the mean)``,
which under-counts a page whose keys differ, so it is not dense attention even where every page is
selected. It is a mode for research, and slow (:mod:`kvplug.attention.attend.coarse`).

A mean says little of one key among many that differ: of a page of 32 unlike keys, one that matches
the query moves the page's score by a 32nd of its own, of a chunk's by a 256th. The method is for
contexts whose pages are about something.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.index.chunk_mean import ChunkMean
from kvplug.policies.base import Policy, Stages
from kvplug.probe.mean import MeanProbe


@dataclass(frozen=True)
class Hcam(Policy):
    """Mean keys of chunks and pages, mean probe, top pages of top chunks."""

    pages: int = 8
    """Pages of a chunk."""
    spread: float = 4.0
    """The chunks looked into together hold this many times the budget."""
    heads: str = "each"
    """Whether ``each`` KV head chooses for itself, or ``all`` choose the same pages."""

    def __post_init__(self) -> None:
        """Refuses what the index cannot serve."""
        self._index()

    def _index(self) -> ChunkMean:
        return ChunkMean(pages=self.pages, spread=self.spread, heads=self.heads)

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        return Stages(index=self._index(), probe=MeanProbe())
