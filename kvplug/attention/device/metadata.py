"""Per-step metadata on CUDA: vLLM's own for its Triton kernel, plus kvplug's plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from kvplug.attention.device.decode_plan import DecodePlans
from kvplug.attention.device.pipeline import DevicePipeline
from kvplug.attention.device.plan import DenseRows, DevicePlan, Lengths
from kvplug.attention.layer_refusals import refuse_builder
from kvplug.errors import KvplugError
from kvplug.policies import make_stages
from kvplug.selection import options_of

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec


@dataclass
class DeviceMetadata(TritonAttentionMetadata):
    """One step's metadata for one group of layers."""

    plan: DevicePlan | None = None
    """None: the group attends to everything, by vLLM's own path."""
    dense: TritonAttentionMetadata | None = None
    """Of what attends to everything beside sparse windows."""

    def learn(self, hidden: torch.Tensor, tokens: torch.Tensor, model: Any) -> None:
        """Nothing: recipes that learn from a step's output are refused on CUDA."""


class DeviceMetadataBuilder(TritonAttentionMetadataBuilder):
    """Plans each step; owns the pipeline that its layers share."""

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Decoded tokens, where the user asks for it: no GPU has captured a graph of it yet."""
        config = options_of(vllm_config)
        if make_stages(config.policy, config.options).graphs:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        """Builds the pipeline and hands it to the layers.

        Raises:
            KvplugError: Options that do not fit the recipe or the page, or layers of another kind.
        """
        refuse_builder(type(self), DeviceMetadataBuilder)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # vLLM would refresh its own fields of a step's metadata in place, and not the plan.
        self.supports_draft_decode_metadata_update = False
        config = options_of(vllm_config)
        self.pipeline = DevicePipeline(config, self.block_size, kv_cache_spec.num_kv_heads)
        if self.pipeline.stages.graphs:
            self.pipeline.decode_plans = _decode_plans(vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for layer in layers.values():
            layer.impl.adopt(self.pipeline)
        # Without vLLM's hybrid cache manager the layers of a group need not be alike.
        self.windowed = all(layer.impl.is_windowed for layer in layers.values())

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> DeviceMetadata:
        """Of vLLM's made-up batch of one token a request, which no metric counts."""
        common = common_attn_metadata
        made_up = {
            "is_prefilling": torch.zeros(common.num_reqs, dtype=torch.bool),
            "seq_lens_cpu_upper_bound": torch.ones(common.num_reqs, dtype=torch.int32),
        }
        metadata = self._build(0, replace(common, **made_up), captured=True)
        metadata.seq_lens.fill_(1)  # as vLLM does for its own kernel: captures would take long
        return metadata

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DeviceMetadata:
        """Stock metadata plus the plan.

        Raises:
            KvplugError: A model runner that does not say what windows are cut by.
        """
        return self._build(common_prefix_len, common_attn_metadata, fast_build)

    def _build(
        self, prefix: int, common: CommonAttentionMetadata, fast: bool = False, *,
        captured: bool = False,
    ) -> DeviceMetadata:  # fmt: skip
        """See :meth:`build`."""
        stock = super().build(prefix, common, fast)
        metadata = DeviceMetadata(**vars(stock))
        if self.windowed:
            return metadata
        lengths = common.seq_lens_cpu_upper_bound  # exact: speculative decoding is refused
        if common.is_prefilling is None or lengths is None or common.causal is not True:
            raise KvplugError("kvplug serves causal decoding by vLLM's own model runner only.")
        prefilling = np.zeros(len(lengths), np.bool_)  # vLLM says it of rows without padding
        prefilling[: len(common.is_prefilling)] = common.is_prefilling.numpy()
        known = Lengths(common.query_start_loc_cpu.numpy(), lengths.numpy(), prefilling)
        where = common.block_table_tensor, common.slot_mapping
        if is_dummy(known) and not captured:
            return metadata
        metadata.plan = self.pipeline.plan(known, *where, counted=not captured)
        if metadata.plan is not None and metadata.plan.dense is not None:
            metadata.dense = dense_metadata(stock, metadata.plan.dense)
        return metadata


def _decode_plans(vllm_config: VllmConfig, device: torch.device) -> DecodePlans:
    """For the largest batch that vLLM may pad one to."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    requests = max(vllm_config.scheduler_config.max_num_seqs, captured)
    return DecodePlans(requests, vllm_config.model_config.max_model_len, device)


def is_dummy(lengths: Lengths) -> bool:
    """Whether a step is nobody's, made up by vLLM: to warm up, or to keep step with other engines.

    It has no slots and others' pages, so nothing is learnt from it, nor is it counted. A request's
    tokens are its prompt's or have something before them; those of such a step neither.
    """
    counts = np.diff(lengths.query_start)
    return not lengths.is_prefilling.any() and bool((lengths.seq_lens == counts).all())


def dense_metadata(stock: TritonAttentionMetadata, rows: DenseRows) -> TritonAttentionMetadata:
    """vLLM's metadata for some tokens of a step, by themselves.

    Args:
        stock: Of the whole step.
        rows: The tokens.
    """
    changed: dict[str, Any] = {
        "num_actual_tokens": len(rows.tokens),
        "max_query_len": rows.longest,
        "query_start_loc": rows.query_start,
        "max_seq_len": rows.longest_context,
        "seq_lens": rows.seq_lens,
        "block_table": stock.block_table.index_select(0, rows.request),
        "slot_mapping": stock.slot_mapping.index_select(0, rows.tokens),
    }
    return replace(stock, **changed)
