"""One attention layer: stock where it is dense, selected pages where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from kvplug.attention.attend.coarse import CoarseMerge
from kvplug.attention.attend.cpu import CpuAttend, SingleHeadCache
from kvplug.attention.attend.fixed import FixedAttend
from kvplug.attention.layer_refusals import refuse_layer
from kvplug.errors import KvplugError
from kvplug.pipeline import Pipeline
from kvplug.stage import LayerShape

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvplug.attention.attend.cpu import Call
    from kvplug.attention.metadata import KvplugMetadata
    from kvplug.layer_stages import LayerStages
    from kvplug.observe.observers import Observers
    from kvplug.offload.hot_pool import HotPool
    from kvplug.pipeline import Plan
    from kvplug.rotary import FixedPositions, Rotary


class KvplugImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention with retrieval on top.

    Raises:
        KvplugError: The layer has something that page retrieval cannot serve.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what it cannot serve, before weights are loaded."""
        super().__init__(*args, **kwargs)
        refuse_layer(self)
        self.pipeline: Pipeline | None = None
        self.attend: CpuAttend | None = None
        self.stages: LayerStages | None = None
        self.cache: SingleHeadCache | None = None
        self.coarse: CoarseMerge | None = None
        self.fixed: FixedAttend | None = None
        """Where far keys stand at one distance; None where they stand where they are."""
        self.hot: HotPool | None = None
        """In front of a cold store; None where the cache itself is attended to."""
        self.is_dense = self.sliding_window != -1
        # Audits and measurements: told queries [T, H, D] and plan once its pages are selected.
        self.observer: Callable[[torch.Tensor, Plan], None] | None = None

    def adopt(self, pipeline: Pipeline, attend: CpuAttend) -> None:
        """Takes the pipeline that the layer's group shares."""
        self.pipeline, self.attend = pipeline, attend

    @property
    def retrieves(self) -> bool:
        """Whether the layer ever attends to less than everything."""
        return not self.is_dense and not self._pipeline.stages.always_dense

    @property
    def _pipeline(self) -> Pipeline:
        assert self.pipeline is not None, "vLLM made no metadata builder for this layer"
        return self.pipeline

    def bind(
        self, kv_cache: torch.Tensor, shape: LayerShape, scales: tuple[float, float] = (1.0, 1.0),
        hot: HotPool | None = None, observers: Observers | None = None,
        rotary: Rotary | None = None,
    ) -> None:  # fmt: skip
        """Takes the layer's cache and allocates what the layer remembers.

        Args:
            kv_cache: ``[pages, Hk, P, 2 * D]``.
            shape: The layer's geometry.
            scales: Of quantised keys and values.
            hot: In front of the cache, where that is a cold store.
            observers: What looks on while the layer attends.
            rotary: The layer's, where positions are fixed; None leaves them as they are.

        Raises:
            KvplugError: The cache's layout is not one that pages can be viewed in, or read in
                where the recipe or fixed positions read them.
        """
        assert self.attend is not None
        self.cache = SingleHeadCache.of(kv_cache, scales)
        reader = self.attend.reader(self.cache)
        fixed = None if rotary is None else self._pipeline.fix(rotary, shape.num_pages)
        self.stages = self._pipeline.make_layer(shape, reader, fixed)
        if self._pipeline.stages.merge == "coarse" and self.stages is not None:
            values = self.attend.value_reader(self.cache)
            if reader is None or values is None:
                raise KvplugError(
                    "Merge 'coarse' reads keys and values back from the KV cache, and kvplug does "
                    "not know how this CPU's kernel packs them: use merge 'exact'."
                )
            means = self.stages.index.means
            self.coarse = CoarseMerge(reader, values, means, self.scale, self.logits_soft_cap)
        if observers is not None:
            self.observer = observers.for_layer(shape, reader)
        if hot is not None:
            self.hot, self.cache = hot, SingleHeadCache.of(hot.pages, scales)
        if fixed is not None:
            self.fixed = self._fixed_attend(fixed)

    def _fixed_attend(self, fixed: FixedPositions) -> FixedAttend:
        """Attends at fixed positions in what attention reads: the cache or the hot pool.

        Raises:
            KvplugError: It cannot be read.
        """
        assert self.attend is not None
        assert self.cache is not None
        keys, values = self.attend.reader(self.cache), self.attend.value_reader(self.cache)
        if keys is None or values is None:
            raise KvplugError(
                "kvplug option positions='fixed' reads keys and values back from the KV cache, and "
                "kvplug cannot tell how this CPU's kernel packs them: choose another "
                "--kv-cache-dtype, or positions 'orig'."
            )
        rounds = self.attend.isa == "amx" and self.attend.dtype == torch.bfloat16
        return FixedAttend(keys, values, fixed, self.scale, self.logits_soft_cap, rounds)

    def _attend(
        self, query: torch.Tensor, output: torch.Tensor, plan: Plan, metadata: KvplugMetadata,
        scales: tuple[float, float],
    ) -> None:  # fmt: skip
        """Attends to the pages that the layer selected."""
        if self.attend is None or self.cache is None:
            raise KvplugError("kvplug's attention layer was used before its cache was bound.")
        assert plan.table is not None
        workspace, table = self._pipeline.workspace, plan.table
        scaling, calls = (self.scale, self.logits_soft_cap, scales), metadata.calls
        by_kernel = plan.by_kernel
        if by_kernel and self._pipeline.stages.budget.varies:
            calls = self.attend.schedule(table.rows(pages=self._pipeline.attended(table)))
        if self.hot is not None:
            calls = calls if by_kernel else []
            self._attend_in_turns(query, output, plan, metadata, calls, scaling)
            return
        if by_kernel:
            self.attend(query, output, self.cache, calls, workspace, *scaling)
        if self.fixed is not None:
            self.fixed(query, output, table, table.table, plan.moved, workspace)

    def _attend_in_turns(
        self, query: torch.Tensor, output: torch.Tensor, plan: Plan, metadata: KvplugMetadata,
        calls: list[Call], scaling: tuple[Any, ...],
    ) -> None:  # fmt: skip
        """The same through the hot pool, whose pages may have to take turns.

        Args:
            query: ``[T, H, D]``.
            output: ``[T, H, D]``, written.
            plan: The step's plan.
            metadata: The step's.
            calls: The kernel's, for the whole step; none where it serves no window.
            scaling: Scale, soft cap, scales of quantised keys and values.
        """
        assert self.attend is not None
        assert self.cache is not None
        assert self.hot is not None
        assert plan.table is not None
        workspace, table = self._pipeline.workspace, plan.table
        if self.hot.links is not None:
            self.hot.links.follow(table.step)
        rows = table.host, table.seq_lens_host, table.slots_host
        shares = table.shares if self._pipeline.keeps_shares else None
        for first, last in self.hot.turns(*rows, metadata.written(self.hot.page), shares):
            if calls and last - first == len(table.query_start) - 1:
                self.attend(query, output, self.cache, calls, workspace, *scaling)
            elif calls:
                mine = slice(int(table.query_start[first]), int(table.query_start[last]))
                part = self.attend.schedule(table.rows(first, last, table.slots))
                self.attend(query[mine], output[mine], self.cache, part, workspace, *scaling)
            if self.fixed is not None:
                moved = plan.moved[(plan.moved >= first) & (plan.moved < last)]
                self.fixed(query, output, table, table.slots, moved, workspace)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KvplugMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends; see :meth:`CPUAttentionBackendImpl.forward` for shapes."""
        plan = None if attn_metadata is None or self.is_dense else attn_metadata.plan
        if plan is not None:
            assert attn_metadata is not None
            tokens = attn_metadata.num_actual_tokens
            self._pipeline.run(self.stages, query[:tokens], key[:tokens], plan)
        elif attn_metadata is not None and self.stages is not None:
            tokens = attn_metadata.num_actual_tokens
            self._pipeline.pass_by(self.stages, query[:tokens], key[:tokens])
        if plan is None or plan.table is None:
            if self.hot is not None and attn_metadata is not None:
                self.hot.rewrite(attn_metadata.written(self.hot.page))
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        assert attn_metadata is not None
        if self.observer is not None:
            self.observer(query[:tokens], plan)
        scales = (layer._k_scale_float, layer._v_scale_float)
        self._attend(query[:tokens], output[:tokens], plan, attn_metadata, scales)
        if self.coarse is not None:
            self.coarse(query[:tokens], output[:tokens], plan, self._pipeline.workspace)
        return output
