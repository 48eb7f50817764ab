"""The pipeline: windows -> probe -> score -> budget -> select -> page table.

The one place that strings it. One :class:`Pipeline` serves all layers of a model on one worker;
one :class:`~kvplug.layer_stages.LayerStages` holds what works on a layer and what it remembers.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvplug.config import KvplugConfig
from kvplug.index.sealing import Seals
from kvplug.layer_stages import LayerStages
from kvplug.page_table import PageTable
from kvplug.pages import PageGeometry, sparse_context
from kvplug.pending import PendingSteps
from kvplug.policies import make_stages
from kvplug.rotary import FixedPositions, PageNumbers
from kvplug.select.unranked import count_unranked
from kvplug.selection_counts import SelectionCounts
from kvplug.stage import Layer, LayerShape, Memory, Passage, Scratch
from kvplug.step import Sealing, Step
from kvplug.windows import EVERYTHING, Batch, cut_windows
from kvplug.workspace import Workspace

if TYPE_CHECKING:
    from kvplug.knobs import Knobs
    from kvplug.page_reader import PageReader
    from kvplug.rotary import Rotary
    from kvplug.segment.base import Segmenter
    from kvplug.windows import Ints, Windows


logger = logging.getLogger("vllm.kvplug")


NONE = np.empty(0, np.int32)


class Plan(NamedTuple):
    """What every layer of a step shares."""

    step: Step
    slots: torch.Tensor
    """``[T]`` int64, where the step's keys go; negative ones are padding."""
    table: PageTable | None
    """None: every window takes the stock path, and the step is only watched."""
    moved: Ints = NONE
    """Windows that are attended at fixed positions."""

    @property
    def by_kernel(self) -> bool:
        """Whether the kernel attends: to every window then, and what is moved is written over."""
        return len(self.moved) < len(self.step.windows)


class Pipeline:
    """Selects pages for the layers of one model.

    Args:
        config: The user's options.
        page: Tokens per page.
        num_kv_heads: KV heads on this worker.

    Raises:
        KvplugError: Options that do not fit the recipe or the page.
    """

    def __init__(self, config: KvplugConfig, page: int, num_kv_heads: int) -> None:
        """Builds the stages."""
        self.config = config
        self.stages = make_stages(config.policy, config.options)
        self.keeps_shares = config.offload is not None and config.offload.eviction == "mass"
        self.geometry = region_sizes(config, page)
        self.num_kv_heads = num_kv_heads
        self.workspace = Workspace()
        self.common: dict[type, Memory] = {}
        self.layers: list[LayerStages] = []
        self.seals: Seals | None = None
        """Which pages every layer has summarised; None before there is a layer."""
        self.pending = PendingSteps(self.geometry)
        self.waiting: slice | None = None
        """Places of the step's tokens among those that wait; None if they do not."""
        self.segmenter: Segmenter | None = None
        self.numbers: PageNumbers | None = None
        """Where pages stand, where positions are fixed and there is a layer."""
        self.watched = False
        self.trace: Any = None
        """Told whose rows a step's are, where requests are traced (:mod:`kvplug.observe.trace`)."""
        self.counts = SelectionCounts()
        self.num_layers = 0
        """Layers that retrieve, those without an index included."""

    def set_budget(self, tokens: int) -> None:
        """Gives windows another budget from the next step on.

        What memories hold was made of windows that attended by the old one: no request may be
        running, and cached prefixes must be dropped, or answers mix the two.

        Args:
            tokens: The new ``budget``.

        Raises:
            KvplugError: It does not fit the page; the old one then stays.
        """
        # `pending` keeps its region sizes: tokens wait below `dense_below`, whatever the budget.
        config = KvplugConfig.parse({**self.config.model_dump(), "budget": tokens})
        self.geometry = region_sizes(config, self.geometry.page)
        self.config = config

    def fix(self, rotary: Rotary, num_pages: int) -> FixedPositions:
        """Where queries and keys of a layer stand that are far from each other.

        Args:
            rotary: Of the layer.
            num_pages: Physical pages of its cache, as of every layer's.
        """
        self.numbers = self.numbers or PageNumbers(num_pages, self.geometry.page)
        return FixedPositions(rotary, self.numbers, self.geometry.local)

    def make_layer(
        self, shape: LayerShape, reader: PageReader | None, fixed: FixedPositions | None = None
    ) -> LayerStages | None:
        """A layer's stages, or None where the recipe retrieves nothing.

        Args:
            shape: The layer's geometry.
            reader: Reads its keys; None where that cannot be done.
            fixed: From :meth:`fix`; None for original positions.
        """
        self.num_layers += 1
        if self.stages.index is None:
            return None
        known = set(self.common)
        layer = LayerStages(self.stages, Layer(shape, self.common, reader, fixed), fixed)
        # The first layer that asks for a shared memory feeds it.
        new = [memory for kind, memory in self.common.items() if kind not in known]
        layer.forgetters += [m for m in new if type(m).forget is not Memory.forget]
        self.seals = self.seals or Seals(shape.num_pages)
        needs_logits = self.stages.segment is not None and self.stages.segment.needs_logits
        self.watched = self.watched or needs_logits or bool(layer.watchers)
        self.segmenter = layer.segmenter
        self.layers.append(layer)
        return layer

    def nbytes(self) -> float:
        """Bytes that memories of all layers take when every page is in use."""
        mine = sum(layer.nbytes() for layer in self.layers)
        return mine + sum(memory.nbytes() for memory in self.common.values())

    def scratch_bytes(self) -> int:
        """Bytes of buffers that steps work in, as large as the largest so far needed."""
        shared = [m.workspace for m in self.common.values() if isinstance(m, Scratch)]
        return sum(workspace.nbytes() for workspace in (self.workspace, *shared))

    def plan(self, batch: Batch) -> Plan | None:
        """Plans one step.

        Returns:
            None where every window is dense and nobody watches, or what there is to learn can
            wait: the step then takes the stock path itself.
        """
        self.waiting = None
        plan = None if self.stages.always_dense else self._plan(batch)
        if plan is None:
            self.counts.dense_tokens += int(batch.query_start[-1])
        else:
            rows = self.num_kv_heads * self.num_layers
            varies = self.stages.budget.varies
            tally = (plan.step.windows, self.geometry.page, rows)
            self.counts.add(*tally, varies=varies)
            if batch.counts is not None:
                batch.counts.add(*tally, varies=varies)
        return plan

    def _plan(self, batch: Batch) -> Plan | None:
        """See :meth:`plan`, for recipes that retrieve."""
        if self.seals is not None:
            self.seals.reset(batch.slots, self.geometry.page)
        if self.watched and self._can_wait(batch):
            return None
        query_start, seq_lens, is_prefilling, block_table, slots, asked, counts = batch
        if self.numbers is not None:
            self.numbers.note(block_table, seq_lens)
        budgets = None if asked is None else asked.budgets
        if not self.watched and seq_lens.max() <= self.geometry.dense_below:
            return None
        cut = (query_start, seq_lens, is_prefilling, self.geometry)
        windows = cut_windows(*cut, budgets=budgets)
        moved = self._moved(windows)
        has_table = bool(windows.sparse.any()) or len(moved) > 0
        if not has_table and not self.watched:
            return None
        stream = cut_windows(*cut, merge=False, budgets=budgets) if self.watched else None
        pages = torch.from_numpy(block_table)
        geometry = self.geometry if budgets is None else self._widest(budgets, seq_lens)
        targets = None if asked is None else asked.targets
        step = Step(windows, pages, geometry.most_pages, stream, is_prefilling, targets, counts)
        if self.segmenter is not None and seq_lens.max() > geometry.dense_below:
            self.segmenter.prepare(step)
        new = torch.from_numpy(slots[: query_start[-1]])
        if not has_table:
            return Plan(step, new, None)
        table = PageTable(step, geometry, self.num_kv_heads, self.workspace)
        return Plan(step, new, table, moved)

    def _moved(self, windows: Windows) -> Ints:
        """Windows that the stock path does not serve: some key is further away than it may be.

        Whether they select pages has no say in it, so that a larger budget moves nothing.
        """
        if self.config.positions == "orig":
            return NONE
        stock = max(self.geometry.dense_below, self.geometry.local + 1)
        return np.flatnonzero(windows.context_end > stock).astype(np.int32)

    def _widest(self, budgets: Ints, seq_lens: Ints) -> PageGeometry:
        """Sizes that rows of the step's page table need where requests have budgets of their own.

        Args:
            budgets: ``[B]``; see :class:`Asked`.
            seq_lens: ``[B]``.
        """
        geometry, page = self.geometry, self.geometry.page
        is_dense = budgets == EVERYTHING
        pages = int(budgets[~is_dense].max(initial=0))
        return geometry._replace(
            most_pages=max(geometry.most_pages, self.stages.budget.most_pages(pages * page, page)),
            dense_below=max(geometry.dense_below, int(seq_lens[is_dense].max(initial=0))),
        )

    def budget_pages(self, knobs: Knobs) -> int:
        """Far pages of the windows of a request with ``knobs``; see :class:`Asked`."""
        if knobs.dense:
            return EVERYTHING
        if knobs.budget is None:
            return self.geometry.budget_pages
        return self.stages.budget.pages(knobs.budget, self.geometry.page)

    def attended(self, table: PageTable) -> torch.Tensor:
        """What the kernel finds pages in, ``[S * Hk, width]``, whatever the layer.

        The table's own pages, or their slots in hot pools, which every layer that selects then has.
        """
        return table.table if self.config.offload is None else table.slots

    def _can_wait(self, batch: Batch) -> bool:
        """Whether the step's tokens wait; if not, those that do are told first."""
        self.waiting = self.pending.add(batch)
        if self.waiting is None and self.pending.count:
            step, slots = self.pending.step(), self.pending.slots
            for layer in self.layers:
                if layer.pending is not None:
                    layer.pending.tell(step, slots, layer, self.workspace)
            self.pending.count = 0
            self.waiting = self.pending.add(batch)
        return self.waiting is not None

    def pass_by(self, layer: LayerStages, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """Keeps a step without a plan, ``[T, H, D]`` and ``[T, Hk, D]``, if it will matter."""
        if self.waiting is not None and layer.pending is not None:
            layer.pending.add(self.waiting, queries, keys)

    def run(
        self, layer: LayerStages | None, queries: torch.Tensor, keys: torch.Tensor, plan: Plan
    ) -> None:
        """Lets one layer's memories learn from the step; writes its pages into the plan's table.

        The step's keys must be in the cache.

        Args:
            layer: The layer's stages; None leaves sinks and local pages only.
            queries: ``[T, H, D]`` of the whole step, any float dtype.
            keys: ``[T, Hk, D]`` of the whole step, any float dtype.
            plan: The step's plan.
        """
        if layer is None:
            return
        passage = Passage(queries, keys, plan.step, self.workspace, layer.fixed)
        layer.watch(passage, plan.slots)
        if plan.table is None or not len(plan.step.sparse_windows):
            return
        sealed = self._sealed(plan.step)
        for memory in layer.beginners if len(sealed.begun) else ():
            memory.begin(sealed, plan.step, self.workspace)
        for memory in layer.sealers if len(sealed.pages) else ():
            memory.seal(sealed, plan.step, self.workspace)
        self._select(layer, passage.queries, plan.step, plan.table)

    def _sealed(self, step: Step) -> Sealing:
        """Pages that every layer summarises in this step.

        Found when the first layer runs, not when the step is planned: a plan may never be run.
        """
        assert self.seals is not None
        if step.sealed is None:
            step.sealed = self.seals.seal(step, self.workspace)
        return step.sealed

    def learn(self, hidden: torch.Tensor, tokens: torch.Tensor, model: Any, step: Step) -> None:
        """Lets the segment stage learn from a step's output; see :meth:`Segmenter.learn`."""
        if self.segmenter is not None:
            self.segmenter.learn(hidden, tokens, model, step)

    def _select(
        self, layer: LayerStages, queries: torch.Tensor, step: Step, table: PageTable
    ) -> None:
        """Probe, score, budget, select, page table."""
        heads, workspace = self.num_kv_heads, self.workspace
        probes = layer.probe.build(queries, heads, step, workspace)
        num_windows = len(step.sparse_windows)
        scores = workspace.take("scores", (num_windows, heads, step.max_far_pages), torch.float32)
        layer.index.score(probes, step, scores)
        self._count_unranked(scores, step)
        counts = workspace.take("counts", (num_windows, heads), torch.int32)
        counts.copy_(step.asked)
        if layer.budget.varies:
            layer.budget.count(scores, queries, step, counts, workspace)
            self.counts.pages_attended += int(counts.sum())
            if step.counts is not None:
                step.counts.add_selected(step.windows.request[step.sparse_windows], counts)
        shape = (num_windows, heads, step.max_selected)
        selected = workspace.take("selected", shape, torch.int32)
        kept = scores
        if self.keeps_shares:
            kept = workspace.take("scores.kept", tuple(scores.shape), torch.float32).copy_(scores)
        layer.select.select(scores, step, counts, selected)
        if self.keeps_shares:
            table.write_shares(kept, selected, counts)
        table.write_selected(selected, counts, layer.budget.varies)

    def _count_unranked(self, scores: torch.Tensor, step: Step) -> None:
        """Counts rows whose scores say nothing; their newest pages are selected."""
        windows = step.windows
        rows = count_unranked(
            scores.numpy(), step.sparse_windows, windows.far_begin, windows.far_end
        )
        if rows and not self.counts.unranked_rows:
            logger.warning(
                "kvplug: page scores are not finite, so queries or keys are not; such windows "
                "attend to sinks, local and the newest far pages. They are counted from now on."
            )
        self.counts.unranked_rows += rows

    def warm_up(self, shape: LayerShape, reader: PageReader | None) -> None:
        """Compiles every kernel that a step can call, on a made-up one, before the first request.

        Args:
            shape: Of a layer with at least as many pages as it takes for a window to be sparse.
            reader: Reads the made-up layer's pages; any content will do.
        """
        geometry, page, heads = self.geometry, self.geometry.page, self.num_kv_heads
        layer = self.make_layer(shape, reader)
        keys = torch.zeros((geometry.window, heads, shape.head_dim))
        queries = torch.zeros((geometry.window, shape.num_heads, shape.head_dim))
        ids = torch.zeros(geometry.window, dtype=torch.int64)
        context = sparse_context(geometry)
        pages = np.arange(-(-context // page), dtype=np.int32)[None]
        # A prompt's first window, then what may retrieve from it: one token, and a whole window.
        whole = geometry.window
        for tokens, end in ((whole, whole), (1, context), (whole, context)):
            starts, ends = np.array([0, tokens], np.int32), np.array([end], np.int32)
            slots = np.arange(end - tokens, end)
            batch = Batch(starts, ends, np.array([tokens > 1]), pages, slots)
            plan = self.plan(batch)
            if plan is None:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                self.run(layer, queries[:tokens].to(dtype), keys[:tokens].to(dtype), plan)
                if self.segmenter is not None:
                    self.learn(keys[:tokens, 0], ids[:tokens], _NoModel(dtype), plan.step)


class _NoModel(NamedTuple):
    """What a warm-up learns from: any logits will do."""

    dtype: torch.dtype

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Two tokens, equally likely."""
        return hidden.new_zeros((len(hidden), 2), dtype=self.dtype)


def region_sizes(config: KvplugConfig, page: int) -> PageGeometry:
    """Region sizes of an engine with pages of ``page`` tokens.

    Raises:
        KvplugError: Options that do not fit the recipe or the page.
    """
    budget = make_stages(config.policy, config.options).budget
    pages = budget.pages(config.budget, page), budget.most_pages(config.budget, page)
    return PageGeometry.of(config, page, *pages)
