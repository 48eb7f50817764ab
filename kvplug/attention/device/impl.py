"""One attention layer on CUDA: vLLM's own where it is dense, selected pages where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from kvplug.attention.attend.flash import FlashAttend, vllm_function
from kvplug.attention.attend.triton import TritonAttend, cache_of
from kvplug.attention.attend.xformers import XformersAttend
from kvplug.attention.attend.xformers_operator import operator_of
from kvplug.attention.layer_refusals import refuse_layer
from kvplug.errors import KvplugError
from kvplug.kernels.page_rows import PageRows

if TYPE_CHECKING:
    from kvplug.attention.device.metadata import DeviceMetadata
    from kvplug.attention.device.pipeline import DeviceLayer, DevicePipeline
    from kvplug.attention.device.plan import DevicePlan
    from kvplug.kernels.paged_attention import PagedCache
    from kvplug.observe.observers import Observers
    from kvplug.offload.device_pool import DevicePool
    from kvplug.rotary import Rotary
    from kvplug.stage import LayerShape


class DeviceImpl(TritonAttentionImpl):
    """vLLM's Triton attention with retrieval on top.

    Raises:
        KvplugError: The layer has something that page retrieval cannot serve.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what it cannot serve, before weights are loaded."""
        super().__init__(*args, **kwargs)
        refuse_layer(self, chunked_local_attention=self.chunk_lookback >= 0)
        self.pipeline: DevicePipeline | None = None
        self.attend: TritonAttend | FlashAttend | XformersAttend | None = None
        self.stages: DeviceLayer | None = None
        self.cache: PagedCache | None = None
        self.hot: DevicePool | None = None
        """Where the cache is in a cold store."""
        self.is_dense = self.is_windowed

    @property
    def is_windowed(self) -> bool:
        """Whether the model itself attends to a sliding window only."""
        return bool(self.sliding_window != (-1, -1))

    def adopt(self, pipeline: DevicePipeline) -> None:
        """Takes the pipeline that the layer's group shares.

        Raises:
            KvplugError: What is asked to attend is not here, or does not serve the layer.
        """
        self.pipeline = pipeline
        window, cap = pipeline.geometry.window, float(self.logits_soft_cap)
        if pipeline.stages.attend == "flash":
            function = vllm_function(self.head_size, bool(cap))
            self.attend = FlashAttend(window, self.scale, cap, function)
        elif pipeline.stages.attend == "xformers":
            where = pipeline.geometry.page, bool(cap), current_platform.device_type
            operator = operator_of(self.head_size, *where)
            self.attend = XformersAttend(window, self.scale, operator)
        else:
            self.attend = TritonAttend(window, self.scale, cap)

    @property
    def retrieves(self) -> bool:
        """Whether the layer ever attends to less than everything."""
        assert self.pipeline is not None, "vLLM made no metadata builder for this layer"
        return not self.is_dense and not self.pipeline.stages.always_dense

    def bind(
        self, kv_cache: torch.Tensor, shape: LayerShape, scales: tuple[float, float] = (1.0, 1.0),
        hot: DevicePool | None = None, observers: Observers | None = None,
        rotary: Rotary | None = None,
    ) -> None:  # fmt: skip
        """Takes the layer's cache and allocates what the layer remembers.

        Args:
            kv_cache: ``[pages, Hk, P, 2 * D]``, in any of vLLM's layouts.
            shape: The layer's geometry.
            scales: Unused: quantised caches are refused.
            hot: The layer's pool, where the cache is in a cold store.
            observers: Unused: audits and traces are refused.
            rotary: Unused: fixed positions are refused.

        Raises:
            KvplugError: There is no memory left for it.
        """
        assert self.pipeline is not None
        self.cache, self.hot = cache_of(kv_cache), hot
        if hot is not None:
            self.pipeline.pools.append(hot)
        try:
            self.stages = self.pipeline.make_layer(shape, self.cache)
        except torch.OutOfMemoryError as error:
            raise KvplugError(
                "The GPU has no memory left for kvplug's index, which vLLM does not count: lower "
                "--gpu-memory-utilization."
            ) from error

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DeviceMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends; see :meth:`TritonAttentionImpl.forward` for shapes."""
        plan = None if attn_metadata is None or self.stages is None else attn_metadata.plan
        if attn_metadata is None or plan is None or self.stages is None:
            return self._stock(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        tokens = attn_metadata.num_actual_tokens
        self.learn(query[:tokens], key[:tokens], value[:tokens], plan)
        if plan.sparse is None:
            return self._stock(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        if plan.dense is not None:
            chosen = plan.dense.tokens
            mine = query.index_select(0, chosen)
            attended = torch.empty_like(mine)
            self._stock(layer, mine, key, value, kv_cache, attn_metadata.dense, attended)
            output.index_copy_(0, chosen.long(), attended)
        self.attend_selected(query[:tokens], output[:tokens], plan)
        return output

    def learn(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: DevicePlan
    ) -> None:
        """Shows a step to whatever remembers, before anything is selected.

        Args:
            query: ``[T, H, D]`` of the whole step.
            key: ``[T, Hk, D]`` of the same tokens, which are in the cache.
            value: ``[T, Hk, D]`` likewise.
            plan: The step.
        """
        assert self.stages is not None
        if plan.stream is not None:
            self.stages.watch(query, key, plan)
        self.stages.write(key, plan)
        if self.hot is not None:
            self.hot.write(key, value, plan.slots)

    def _stock(self, *args: Any) -> torch.Tensor:
        """vLLM's own path."""
        output: torch.Tensor = super().forward(*args)
        return output

    def attend_selected(self, query: torch.Tensor, output: torch.Tensor, plan: DevicePlan) -> None:
        """Selects pages for the sparse windows and attends to them.

        Args:
            query: ``[T, H, D]`` of the whole step.
            output: ``[T, H, D]``, written at the windows' tokens.
            plan: The step, with sparse windows.
        """
        assert self.stages is not None
        assert self.attend is not None
        assert self.cache is not None
        assert plan.sparse is not None
        rows = self.stages.select(query, plan, plan.sparse)
        if self.hot is None:
            self.attend(query, output, self.cache, plan.sparse, rows)
            return
        for turn in plan.turns:
            mine = PageRows(*(column[turn.rows] for column in rows))
            rest = PageRows(*(column[turn.rows.stop :] for column in rows))
            slots = self.hot.place(mine, turn.most, rest if len(rest.lengths) else None)
            self.attend(query, output, self.hot.cache, turn.windows, slots)
        self.hot.tell()

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Not for windows that select pages."""
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """Keys must reach :meth:`forward` as they went into the cache."""
        return False
