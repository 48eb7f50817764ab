"""Surprise events: a new one begins where the model did not expect what comes.

Fountas et al. (2025, "Human-inspired Episodic Memory for Infinite Context LLMs", arXiv 2407.09450).
Where this differs:

- An event starts at the surprising token. The authors' code starts it one earlier: it files the
  surprise of token t + 1 under t.
- Events are page ranges: a boundary counts at the nearest page edge, and no event is shorter than
  a page.
- Mean and deviation are those of the ``history`` tokens before the token's window, windows lying
  at absolute multiples of ``window``; in the first window, of the tokens up to the end of the
  token's page. (The authors: about 3,500 tokens before the current chunk, whatever its size; the
  first chunk takes its own.)
- Refinement compares keys after the rotary embedding, of the last layer that retrieves. It cannot
  move a boundary out of its page and does not see what lies behind the page, for pages are shared
  between requests. The surprising token itself is a candidate.
- Decoded tokens have no surprise; what was decoded is cut into events of ``max_tokens``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvplug.errors import KvplugError, nearest_name
from kvplug.segment.base import EventStarts, Segment, Segmenter
from kvplug.segment.cut import Cutting, cut_events
from kvplug.segment.deferred import NO_TOKEN, DeferredTokens, slots_of
from kvplug.segment.memory import SurpriseMemory
from kvplug.segment.prompts import Prompts
from kvplug.segment.refine import METRICS
from kvplug.segment.similarity import KeySums
from kvplug.segment.surprisal import SurpriseMeter
from kvplug.stage import Layer
from kvplug.workspace import Workspace

if TYPE_CHECKING:
    from kvplug.step import Step

WINDOWS_AT_ONCE = 8
"""Windows refined at once: their key sums stay in memory, however many the step has."""


@dataclass(frozen=True)
class Surprise(Segment):
    """Boundaries at surprising tokens, optionally moved to where the keys split best."""

    name = "surprise"
    needs_logits = True

    gamma: float = 1.0
    """Standard deviations above the mean surprise that make a boundary; very many for none."""
    history: int = 4096
    """Tokens before a window over which mean and deviation are taken."""
    min_tokens: int = 8
    """Boundaries nearer than this to the one before are dropped."""
    max_tokens: int = 128
    """Longest event, rounded down to pages, at least one."""
    refine: str = "none"
    """What moves boundaries: ``none``, ``modularity`` or ``conductance``."""

    def __post_init__(self) -> None:
        """Refuses what makes no events."""
        if not self.gamma >= 0:
            raise KvplugError(f"segment 'surprise' needs gamma >= 0, not {self.gamma}.")
        if self.history < 2:
            raise KvplugError(f"segment 'surprise' needs history >= 2, not {self.history}.")
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise KvplugError(
                f"segment 'surprise' needs 1 <= min_tokens <= max_tokens, not "
                f"{self.min_tokens}, {self.max_tokens}."
            )
        if self.refine not in METRICS:
            raise KvplugError(
                f"Unknown refine {self.refine!r} of segment 'surprise': "
                f"{nearest_name(self.refine, METRICS)}."
            )

    @property
    def needs_every_head(self) -> bool:
        """See :attr:`Segment.needs_every_head`."""
        return self.refine != "none"

    def chunk_limit(self, local: int, window: int) -> int | None:
        """See :meth:`Segment.chunk_limit`."""
        return max(window, local // window * window)

    def for_layer(self, layer: Layer) -> SurpriseSegmenter:
        """See :meth:`Segment.for_layer`."""
        return SurpriseSegmenter(self, layer)


class SurpriseSegmenter(Segmenter):
    """Measures surprise and files events, under memories that all layers share.

    Args:
        options: The stage.
        layer: Whose keys refinement compares.
    """

    def __init__(self, options: Surprise, layer: Layer) -> None:
        """Makes or finds the memories."""
        shape = layer.shape
        self.memory = layer.shared(SurpriseMemory)
        self.deferred = layer.shared(DeferredTokens)
        self.events = layer.shared(EventStarts)
        self.events.limit(options.max_tokens)
        self.cutting = Cutting(
            gamma=options.gamma,
            history=options.history,
            least=options.min_tokens,
            most=self.events.most_pages * shape.page,
            metric=METRICS.index(options.refine),
            page=shape.page,
        )
        self._window, self._dense_below = shape.window, shape.dense_below
        self._workspace = Workspace()
        self._meter = SurpriseMeter()
        self._model: Any = None
        self._sums: KeySums | None = None
        if options.refine != "none":
            self._sums = KeySums(layer.reader, shape.num_kv_heads, shape.page, self._workspace)

    def prepare(self, step: Step) -> None:
        """See :meth:`Segmenter.prepare`: measures and cuts what was deferred."""
        stream = step.stream
        if not self.deferred.num_uncut[0]:
            return
        begins, ends = stream.context_end - stream.num_tokens, stream.context_end
        before = np.zeros(len(step.block_table_host), np.int32)
        # The first window of a request says where its step begins, the last one where it ends.
        before[stream.request[::-1]] = np.minimum(begins, self._dense_below)[::-1]
        is_short = np.ones(len(before), bool)
        is_short[stream.request[ends > self._dense_below]] = False
        before[is_short] = 0
        prompts = self.deferred.uncut_windows(step.block_table_host, before)
        if prompts is not None:
            slots = slots_of(prompts, step.block_table_host, self.memory.shape.page)
            pages = np.unique(slots // self.memory.shape.page).astype(np.int32)
            self.deferred.measure(pages, self._measure, self.memory.surprise)
            surprise = self.memory.surprise.view(-1)[torch.from_numpy(slots)]
            self._cut_all(prompts, surprise, step)
            self.deferred.cut(pages)

    def learn(self, hidden: torch.Tensor, tokens: torch.Tensor, model: Any, step: Step) -> None:
        """See :meth:`Segmenter.learn`."""
        self._model = model
        prompts = Prompts.of(step)
        if prompts is None:
            return
        self._remember(hidden, prompts, step)
        before, ids = self._before(hidden, tokens, prompts, step)
        stream = step.stream
        is_long = np.zeros(len(step.block_table_host), bool)
        is_long[stream.request[stream.context_end > self._dense_below]] = True
        # A prefix hit may be on pages of this very step: what comes first in a context goes first.
        order = np.argsort(prompts.first, kind="stable")
        is_long = is_long[prompts.request[order]]
        if not is_long.all():
            later, mine = prompts.subset(order[~is_long])
            self.deferred.add(
                later, step.block_table_host, before[mine], ids[mine], self._measure,
                self.memory.surprise,
            )  # fmt: skip
        if is_long.any():
            self.prepare(step)
            now, mine = prompts.subset(order[is_long])
            surprise = self._workspace.take("segment.surprise", (len(mine),), torch.float32)
            self._measure(before[mine], ids[mine], surprise)
            self._cut_all(now, surprise, step)

    def _measure(self, before: torch.Tensor, tokens: torch.Tensor, surprise: torch.Tensor) -> None:
        """See :meth:`SurpriseMeter.measure`."""
        self._meter.measure(before, tokens, self._model, surprise)

    def _cut_all(self, prompts: Prompts, surprise: torch.Tensor, step: Step) -> None:
        """Files events of windows, whose history is filed or among the windows before them."""
        at_once = len(prompts.request) if self._sums is None else WINDOWS_AT_ONCE
        for begin in range(0, len(prompts.request), at_once):
            self._cut(prompts.part(begin, begin + at_once), surprise, step)

    def _before(
        self, hidden: torch.Tensor, tokens: torch.Tensor, prompts: Prompts, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The state before each of the step's prompt tokens, and the tokens.

        Returns:
            ``[T, hidden_size]``; ``[T]`` int64, NO_TOKEN where the state before is unknown.
        """
        memory = self.memory
        index = torch.from_numpy(prompts.places)
        shape = (len(index), hidden.shape[1])
        before = self._workspace.take("segment.before", shape, hidden.dtype)
        torch.index_select(hidden, 0, (index - 1).clamp(min=0), out=before)
        heads = prompts.runs()[:-1]
        opening = torch.from_numpy(prompts.offset[heads].astype(np.int64))
        position = prompts.first[heads]
        earlier = step.block_table_host[
            prompts.request[heads], np.maximum(position - 1, 0) // memory.shape.page
        ].astype(np.int64)
        known = torch.from_numpy((position > 0) & (position % self._window == 0))
        known &= memory.known[earlier] == 1
        if memory.hidden is not None:
            before[opening] = memory.hidden[earlier]
        ids = tokens[index].long()
        ids[opening[~known]] = NO_TOKEN
        return before, ids

    def _remember(self, hidden: torch.Tensor, prompts: Prompts, step: Step) -> None:
        """Keeps the hidden state at the end of every window that is complete."""
        end = prompts.first + prompts.tokens
        whole = np.flatnonzero(end % self._window == 0)
        last = (end[whole] - 1) // self.memory.shape.page
        pages = step.block_table_host[prompts.request[whole], last]
        rows = prompts.places[prompts.offset[1:][whole] - 1]
        self.memory.remember(
            torch.from_numpy(pages.astype(np.int64)), hidden, torch.from_numpy(rows)
        )

    def _cut(self, prompts: Prompts, surprise: torch.Tensor, step: Step) -> None:
        """Files events of windows; see :meth:`_cut_all`."""
        memory = self.memory
        if self._sums is None:
            sums = self._workspace.take("segment.sums", (len(prompts.request), 0, 0), torch.float64)
            first = prompts.first
        else:
            reach = self.cutting.reach
            sums, first = self._sums.around(prompts, reach, step.block_table_host)
        cut_events(
            self.cutting, prompts.request, prompts.first, prompts.offset, surprise.numpy(),
            step.block_table_host, sums.numpy(), first, memory.surprise.numpy(),
            memory.boundary.numpy(), self.events.starts.numpy(),
        )  # fmt: skip
