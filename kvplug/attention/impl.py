"""One attention layer: stock where it is dense, selected pages where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from kvplug.attention.attend.cpu import CpuAttend, SingleHeadCache
from kvplug.errors import KvplugError
from kvplug.index.base import IndexShape, PageIndex
from kvplug.pipeline import Pipeline, as_float

if TYPE_CHECKING:
    from kvplug.attention.metadata import KvplugMetadata


class KvplugImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention with retrieval on top.

    Raises:
        KvplugError: The layer has something that page retrieval cannot serve.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what it cannot serve, before weights are loaded."""
        super().__init__(*args, **kwargs)
        refusals = {
            "ALiBi position biases": self.alibi_slopes is not None,
            "attention sinks": self.sinks is not None,
            "encoder or cross attention": self.attn_type != AttentionType.DECODER,
            "KV caches shared between layers": self.kv_sharing_target_layer_name is not None,
        }
        for what, present in refusals.items():
            if present:
                raise KvplugError(f"kvplug cannot serve this model: it has {what}.")
        self.pipeline: Pipeline | None = None
        self.attend: CpuAttend | None = None
        self.index: PageIndex | None = None
        self.cache: SingleHeadCache | None = None
        self.is_dense = self.sliding_window != -1

    def adopt(self, pipeline: Pipeline, attend: CpuAttend) -> None:
        """Takes the pipeline that the layer's group shares."""
        self.pipeline, self.attend = pipeline, attend

    def bind(
        self, layer_name: str, kv_cache: torch.Tensor, dense_layers: frozenset[int],
        first_kv_head: int, seed: int,
    ) -> None:  # fmt: skip
        """Takes the layer's cache and allocates its index.

        Args:
            layer_name: vLLM's name, which holds the layer's number.
            kv_cache: ``[pages, Hk, P, 2 * D]``.
            dense_layers: Layers that never select.
            first_kv_head: Model-wide number of this worker's first KV head.
            seed: Of the hash planes.

        Raises:
            KvplugError: The cache's layout is not one that pages can be viewed in.
        """
        layer = extract_layer_index(layer_name)
        self.is_dense = self.is_dense or layer in dense_layers
        if self.is_dense or self.pipeline is None or self.pipeline.stages.always_dense:
            return
        self.cache = SingleHeadCache.of(kv_cache)
        pages, heads, page, width = kv_cache.shape
        shape = IndexShape(pages, heads, page, width // 2, layer, first_kv_head, seed)
        self.index = self.pipeline.make_index(shape)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes keys and values to the cache, and keys to the index."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.index is not None and self.pipeline is not None:
            self.index.write(as_float(key, self.pipeline.workspace, "keys"), slot_mapping)

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
        if plan is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        if self.pipeline is None or self.attend is None or self.cache is None:
            raise KvplugError("kvplug's attention layer was used before its cache was bound.")
        assert attn_metadata is not None
        assert attn_metadata.schedule is not None
        tokens = attn_metadata.num_actual_tokens
        query = query[:tokens]
        self.pipeline.select(self.index, query, plan)
        self.attend(
            query, output[:tokens], self.cache, plan, attn_metadata.schedule,
            self.pipeline.workspace, self.scale, self.logits_soft_cap,
            (layer._k_scale_float, layer._v_scale_float),
        )  # fmt: skip
        return output
