"""The pipeline: windows -> probe -> score -> select -> page table. The one place that strings it.

One :class:`Pipeline` serves all layers of a model on one worker; one :class:`LayerIndex` holds
what a layer remembers of its keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kvplug.index.base import IndexShape
from kvplug.page_table import PageTable, head_major_order
from kvplug.pages import PageGeometry
from kvplug.policies import make_policy
from kvplug.step import Step
from kvplug.windows import cut_windows
from kvplug.workspace import Workspace

if TYPE_CHECKING:
    from kvplug.config import KvplugConfig
    from kvplug.index.base import PageIndex
    from kvplug.windows import Flags, Ints


class Plan(NamedTuple):
    """What every layer of a step shares, where at least one window is sparse."""

    step: Step
    table: PageTable
    order: torch.Tensor | None
    """Head-major order of queries; see :func:`kvplug.page_table.head_major_order`."""


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
        self.policy = make_policy(config.policy, config.options)
        self.stages = self.policy.stages()
        budget = self.stages.budget.pages(config.budget, page) * page
        self.geometry = PageGeometry.of(config, page, budget)
        self.num_kv_heads = num_kv_heads
        self.workspace = Workspace()

    def make_index(self, shape: IndexShape) -> PageIndex | None:
        """A layer's index, or None where the recipe needs none."""
        return self.stages.make_index(shape) if self.stages.make_index else None

    def is_dense_up_to(self, longest: int) -> bool:
        """Whether a step whose longest context has ``longest`` tokens is dense throughout."""
        return self.stages.always_dense or longest <= self.geometry.dense_below

    def plan(
        self, query_start: Ints, seq_lens: Ints, is_prefilling: Flags, block_table: torch.Tensor
    ) -> Plan | None:
        """Plans one step.

        Args:
            query_start: ``[B + 1]`` first query token of each request, then the total.
            seq_lens: ``[B]`` context lengths, this step's tokens included.
            is_prefilling: ``[B]`` whether the prompt was incomplete before this step.
            block_table: ``[B, max_pages]`` int32 physical pages.

        Returns:
            None where every window is dense: the step then takes the stock path itself.
        """
        if self.stages.always_dense:
            return None
        windows = cut_windows(query_start, seq_lens, is_prefilling, self.geometry)
        if not windows.sparse.any():
            return None
        step = Step(windows, block_table)
        table = PageTable(step, self.geometry, self.num_kv_heads, self.workspace)
        return Plan(step, table, head_major_order(step, self.num_kv_heads))

    def select(self, index: PageIndex | None, queries: torch.Tensor, plan: Plan) -> None:
        """Chooses one layer's pages and writes them into the plan's page table.

        Args:
            index: The layer's index; None leaves sinks and local pages only.
            queries: ``[T, H, D]`` of the whole step, any float dtype.
            plan: The step's plan.
        """
        step, stages, heads = plan.step, self.stages, self.num_kv_heads
        if index is None or stages.probe is None or step.max_selected == 0:
            return
        floats = as_float(queries, self.workspace, "queries")
        probes = stages.probe.build(floats, heads, step, self.workspace)
        num_windows = len(step.sparse_windows)
        scores = self.workspace.take(
            "scores", (num_windows, heads, step.max_far_pages), torch.float32
        )
        index.score(probes, step, scores)
        selected = self.workspace.take(
            "selected", (num_windows, heads, step.max_selected), torch.int32
        )
        stages.select.select(scores, step, selected)
        plan.table.write_selected(selected)

    def warm_up(self, head_dim: int) -> None:
        """Compiles every kernel that a step can call, on a made-up one, before the first request.

        Args:
            head_dim: D.
        """
        page, heads = self.geometry.page, self.num_kv_heads
        context = self.geometry.dense_below + self.geometry.local + page
        context += (self.geometry.sink_pages + self.geometry.budget_pages + 1) * page
        pages = -(-context // page)
        shape = IndexShape(pages, heads, page, head_dim, 0, 0, 0)
        index = self.make_index(shape)
        keys = torch.zeros((2, heads, head_dim))
        if index is not None:
            for count in (1, 2):
                index.write(keys[:count], torch.arange(count))
        ends, table = np.array([context], np.int32), torch.arange(pages, dtype=torch.int32)[None]
        for tokens in (1, self.geometry.window):
            starts = np.array([0, tokens], np.int32)
            plan = self.plan(starts, ends, np.array([tokens > 1]), table)
            if plan is not None:
                self.select(index, torch.zeros((tokens, heads, head_dim)), plan)


def as_float(vectors: torch.Tensor, workspace: Workspace, name: str) -> torch.Tensor:
    """``vectors`` as contiguous float32, in the workspace unless they are that already."""
    if vectors.dtype == torch.float32 and vectors.is_contiguous():
        return vectors
    return workspace.take(name, tuple(vectors.shape), torch.float32).copy_(vectors)
