"""The pipeline on a GPU: memory, probes, scores, pages and their rows, strung from ``kernels/``.

The twin on CPU is :mod:`kvplug.pipeline`. Nothing waits for the device, so windows whose scores are
not finite are not counted; as on CPU they attend to sinks, local and the newest far pages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kvplug.attention.device.attended import FarPagesAttended
from kvplug.attention.device.budgets import make_budget
from kvplug.attention.device.decode_plan import DecodePlans
from kvplug.attention.device.filled import chunk_ends
from kvplug.attention.device.memories import make_memory
from kvplug.attention.device.memory import DeviceMemory, first_pages
from kvplug.attention.device.plan import (
    DevicePlan,
    Lengths,
    SparseWindows,
    make_plan,
)
from kvplug.attention.device.probes import make_probe
from kvplug.attention.device.selects import make_select
from kvplug.attention.device.send import ALIGNED, send
from kvplug.attention.device.turns import Pool, Turn, decode_turns, turns_of
from kvplug.attention.device.watchers import BoundLayer, DeviceState
from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError
from kvplug.kernels.page_rows import Contexts, PageRows, page_rows
from kvplug.kernels.top_pages import candidates_shape, top_pages
from kvplug.pipeline import region_sizes
from kvplug.policies import make_stages
from kvplug.selection_counts import SelectionCounts

if TYPE_CHECKING:
    from kvplug.kernels.paged_attention import PagedCache
    from kvplug.offload.device_pool import DevicePool
    from kvplug.pages import PageGeometry
    from kvplug.stage import LayerShape
    from kvplug.windows import Ints

SCRATCH = 64 * 2**20
"""Bytes of scores and what leads to them that a layer has at a time; more windows go in turns."""


def row_width(geometry: PageGeometry, *, dense: bool = False) -> int:
    """Pages of the widest row of a window that selects.

    Args:
        geometry: Region sizes.
        dense: Whether windows that attend to everything have rows too.
    """
    local_pages = -(-(geometry.local + geometry.window) // geometry.page) + 1
    width = geometry.sink_pages + geometry.most_pages + local_pages
    return max(width, -(-geometry.dense_below // geometry.page)) if dense else width


class DeviceLayer:
    """What works on one layer.

    Args:
        pipeline: Whose recipe.
        shape: The layer's geometry.
        cache: Its keys and values.
    """

    def __init__(self, pipeline: DevicePipeline, shape: LayerShape, cache: PagedCache) -> None:
        """Allocates what the layer remembers."""
        self.pipeline, self.shape, self.cache = pipeline, shape, cache
        stages = pipeline.stages
        self.bound = BoundLayer(shape, cache.keys.device, pipeline.common)
        self.memory: DeviceMemory | None = make_memory(stages.index, self.bound)
        self.probe = make_probe(stages.probe, self.bound)
        self.budget = make_budget(stages.budget, self.bound)
        self.ranker = make_select(stages.select, self.bound)
        """None: the best pages by score are taken."""
        self.watchers, self.sealers = self.bound.watchers, self.bound.sealers

    def watch(self, queries: torch.Tensor, keys: torch.Tensor, plan: DevicePlan) -> None:
        """Shows a step to whatever learns from it.

        Args:
            queries: ``[T, H, D]`` of the whole step.
            keys: ``[T, Hk, D]`` of the same tokens, which are in the cache.
            plan: The step.
        """
        for watcher in self.watchers:
            watcher.watch(queries, keys, self.cache, plan)

    def nbytes(self) -> int:
        """Bytes that it remembers in, beside what all layers share."""
        index = 0 if self.memory is None else self.memory.nbytes()
        return index + sum(state.nbytes() for state in self.bound.states.values())

    def write(self, keys: torch.Tensor, plan: DevicePlan) -> None:
        """Learns a step's new keys ``[T, Hk, D]``, which are in the cache."""
        if self.memory is not None:
            self.memory.write(keys, self.cache, plan)

    def select(self, queries: torch.Tensor, plan: DevicePlan, windows: SparseWindows) -> PageRows:
        """Rows of the pages that every window and KV head attends to.

        Args:
            queries: ``[T, H, D]`` of the whole step.
            plan: The step.
            windows: Its sparse windows.
        """
        heads, pipeline = self.shape.num_kv_heads, self.pipeline
        geometry = pipeline.geometry
        size = len(windows) * heads, pipeline.row_width
        # Others' kernels may look a page up behind a row's pages: it must be one.
        ours = pipeline.stages.attend in (None, "triton")
        table = (queries.new_empty if ours else queries.new_zeros)(size, dtype=torch.int32)
        rows = PageRows(table, queries.new_empty(size[:1], dtype=torch.int32))
        for sealer in self.sealers:
            far = windows.contexts(plan.block_table, geometry.page).far
            sealer.seal(self.cache, far, windows.most_far)
        step = self._windows_at_a_time(windows)
        for first in range(0, len(windows), step):
            part = windows.span(first, min(first + step, len(windows)))
            mine = slice(first * heads, (first + len(part)) * heads)
            contexts = part.contexts(plan.block_table, geometry.page)
            own = PageRows(*(column[mine] for column in rows))
            self._select(queries, part, contexts, own, plan, first)
        if self.budget is not None:
            self.budget.learn(plan)
            self.pipeline.tell(self)
        return rows

    def _windows_at_a_time(self, windows: SparseWindows) -> int:
        """So many that their scratch stays below :data:`SCRATCH`, and that parts are aligned."""
        if self.memory is None or self.probe is None:
            return len(windows)
        probes = self.probe.most * self.shape.num_heads // self.shape.num_kv_heads
        each = self.memory.scratch_bytes(probes, windows.most_far)
        for stage in (self.budget, self.ranker):  # each takes as much as the scores at most
            each += 0 if stage is None else 4 * windows.most_far
        return max(SCRATCH // (each * self.shape.num_kv_heads) // ALIGNED * ALIGNED, 1)

    def _select(
        self, queries: torch.Tensor, windows: SparseWindows, contexts: Contexts, rows: PageRows,
        plan: DevicePlan, first: int,
    ) -> None:  # fmt: skip
        """Probe, score, budget, select, rows."""
        geometry = self.pipeline.geometry
        num, heads = len(windows), self.shape.num_kv_heads
        if self.memory is None:
            counts = queries.new_zeros((num, heads), dtype=torch.int32)
            page_rows(counts[:, :, None].contiguous(), counts, contexts, rows)
            return
        assert self.probe is not None, "a recipe with an index has a probe"
        vectors, counts = self.probe.build(queries, windows, contexts.far)
        scores = queries.new_empty((num, heads, windows.most_far), dtype=torch.float32)
        self.memory.score(vectors, counts, windows, contexts.far, scores)
        wanted: torch.Tensor | int = geometry.budget_pages
        if self.budget is not None:
            wanted = self.budget.count(scores, windows, first, geometry.budget_pages, plan)
        if self.ranker is not None:
            scores = self.ranker.rank(scores, wanted, contexts.far)
        chunks = candidates_shape(num, heads, windows.most_far, geometry.most_pages)
        candidates = queries.new_empty(chunks, dtype=torch.int32) if chunks else None
        top_pages(scores, wanted, contexts, rows, candidates)


class DevicePipeline:
    """Selects pages for the layers of one group on one GPU.

    Args:
        config: The user's options, of a recipe that :mod:`kvplug.attention.device.refusals` serves.
        page: Tokens per page.
        num_kv_heads: KV heads on this worker.
    """

    def __init__(self, config: KvplugConfig, page: int, num_kv_heads: int) -> None:
        """Builds the stages."""
        self.config = config
        self.stages = make_stages(config.policy, config.options)
        self.geometry = region_sizes(config, page)
        self.num_kv_heads = num_kv_heads
        self.common: dict[type, DeviceState] = {}
        """What all layers share."""
        self.watched = False
        """Whether a layer has anything that learns from steps."""
        self.layers: list[DeviceLayer] = []
        self._counts = SelectionCounts()
        self.decode_plans: DecodePlans | None = None
        """What plans steps of decoded tokens for graphs; None: there are none."""
        self._begun: torch.Tensor | None = None
        """``[m, n]`` first pages of contexts that began in a step which was to learn nothing."""
        self.first_tokens = 0
        """Of a context, that are learnt from when all are there."""
        self.chunk_pages = 0
        """Of chunks that are learnt from when they are complete; 0: there are none."""
        self.pools: list[DevicePool] = []
        """Every layer's, or none."""
        self.trace: Any = None
        """Nothing is traced on a GPU."""

    def set_budget(self, tokens: int) -> None:
        """Gives windows another budget from the next step on, as the pipeline on CPU does.

        Raises:
            KvplugError: It does not fit the page or the hot pool, or graphs have the old one; that
                then stays.
        """
        if self.decode_plans is not None:
            raise KvplugError("Beside option 'graphs' the budget stays: graphs keep theirs.")
        config = KvplugConfig.parse({**self.config.model_dump(), "budget": tokens})
        geometry = region_sizes(config, self.geometry.page)
        needed = row_width(geometry) * self.num_kv_heads
        for pool in self.pools:
            if needed > len(pool.pages):
                raise KvplugError(
                    f"A budget of {tokens} needs {needed} pages of KV heads in a layer's hot pool, "
                    f"which has {len(pool.pages)}: ask for less, or raise kvplug option "
                    f"offload.hot_gib."
                )
        self.config, self.geometry = config, geometry

    @property
    def row_width(self) -> int:
        """See :func:`row_width`; where graphs are asked for, all decoded tokens have rows."""
        return row_width(self.geometry, dense=self.decode_plans is not None)

    def make_layer(self, shape: LayerShape, cache: PagedCache) -> DeviceLayer:
        """A layer, with what it remembers."""
        layer = DeviceLayer(self, shape, cache)
        self.first_tokens = first_pages(shape) * shape.page
        self.chunk_pages = layer.memory.chunk_pages if layer.memory is not None else 0
        self.watched = self.watched or bool(layer.watchers)
        self.layers.append(layer)
        return layer

    def plan(
        self, lengths: Lengths, block_table: torch.Tensor, slots: torch.Tensor, *,
        counted: bool = True,
    ) -> DevicePlan | None:  # fmt: skip
        """Plans one step; see :func:`make_plan`. None: the recipe attends to everything.

        Args:
            lengths: Of the batch, on the host.
            block_table: ``[B, max_pages]`` int32 on the device.
            slots: ``[T]`` int64 on the device, or more.
            counted: Whether what the step selects goes into :attr:`counts`.
        """
        if self.stages.always_dense:
            self._counts.dense_tokens += int(lengths.query_start[-1])
            return None
        self._learn_begun()
        is_fixed = self.decode_plans is not None and self.decode_plans.serves(lengths)
        if self.decode_plans is not None and is_fixed:
            known = self.geometry, self.first_tokens
            plan, begun = self.decode_plans.plan(lengths, block_table, slots, *known)
            self._note_begun(begun, block_table)
        else:
            plan = make_plan(
                lengths, block_table, slots, self.geometry, self.first_tokens, watched=self.watched
            )
        if self.chunk_pages:
            sizes = self.geometry.page, self.chunk_pages
            plan = plan._replace(chunks=chunk_ends(lengths, *sizes, block_table.device))
        if self.pools and plan.sparse is not None:
            plan = plan._replace(turns=self._turns(plan, plan.sparse, is_fixed=is_fixed))
        if counted:
            rows, varies = self.num_kv_heads * len(self.layers), self.stages.budget.varies
            self._counts.add(plan.windows, self.geometry.page, rows, varies=varies)
            for pool in self.pools:
                pool.count(int(lengths.query_start[-1]), len(plan.turns))
        return plan

    def _turns(self, plan: DevicePlan, sparse: SparseWindows, *, is_fixed: bool) -> list[Turn]:
        """Turns of a step; fixed ones are those of a graph."""
        slots, page = min(len(pool.pages) for pool in self.pools), self.geometry.page
        pool = Pool(self.row_width, self.num_kv_heads, slots)
        if is_fixed:
            assert self.decode_plans is not None
            return decode_turns(sparse, -(-self.decode_plans.longest // page), pool)
        return turns_of(plan, page, pool)

    def _note_begun(self, begun: Ints, block_table: torch.Tensor) -> None:
        """Keeps the first pages of the contexts that begin, until the step has filled them."""
        if self.first_tokens and len(begun):
            pages = block_table.index_select(0, send(begun, block_table.device))
            self._begun = pages[:, : self.first_tokens // self.geometry.page].contiguous()

    def _learn_begun(self) -> None:
        """Learns what the last step did not."""
        if self._begun is not None:
            for layer in self.layers:
                if layer.memory is not None:
                    layer.memory.begin(self._begun, layer.cache)
            self._begun = None

    @property
    def counts(self) -> SelectionCounts:
        """What was selected so far.

        Where budgets vary, far pages are those of the last step whose count has come from the GPU.
        """
        counts = replace(self._counts)
        far = self.common.get(FarPagesAttended)
        if isinstance(far, FarPagesAttended):
            counts.pages_attended += far.told
        return counts

    def tell(self, layer: DeviceLayer) -> None:
        """Sends counts of far pages on their way, when the last layer has counted its own."""
        far = self.common.get(FarPagesAttended)
        if isinstance(far, FarPagesAttended) and layer is self.layers[-1]:
            far.tell()

    def nbytes(self) -> int:
        """Bytes that memories of all layers take."""
        return sum(state.nbytes() for state in self.common.values()) + sum(
            layer.nbytes() for layer in self.layers
        )

    def scratch_bytes(self) -> int:
        """None outlives a step: torch's allocator has what steps work in."""
        return 0
