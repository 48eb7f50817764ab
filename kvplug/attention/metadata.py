"""Per-step metadata: vLLM's own for the CPU kernel, plus kvplug's plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from kvplug.attention.attend.cpu import Call, CpuAttend
from kvplug.attention.layer_refusals import refuse_builder
from kvplug.errors import KvplugError
from kvplug.offload.written import Written
from kvplug.pipeline import Pipeline, Plan
from kvplug.row_counts import RowCounts
from kvplug.selection import options_of
from kvplug.windows import EVERYTHING, Asked, Batch

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec


@dataclass
class KvplugMetadata(CPUAttentionMetadata):
    """One step's metadata for one group of layers."""

    plan: Plan | None = None
    """None: every window is dense, nobody watches, and the step takes the stock path."""
    calls: list[Call] = field(default_factory=list)
    """The kernel's, over what :meth:`Pipeline.attended` says."""
    pipeline: Pipeline | None = None
    """Of the group."""
    _written: Written | None = None

    def written(self, page: int) -> Written:
        """The pages of ``page`` tokens that the step writes to, found once."""
        if self._written is None:
            self._written = Written.of(self.slot_mapping[: self.num_actual_tokens], page)
        return self._written

    def learn(self, hidden: torch.Tensor, tokens: torch.Tensor, model: Any) -> None:
        """Lets the recipe learn from the step's output, where it does.

        Args:
            hidden: ``[T, hidden_size]`` or more rows of padding.
            tokens: ``[T]`` token ids, or more.
            model: vLLM's model.
        """
        if self.plan is not None and self.pipeline is not None:
            actual = slice(self.num_actual_tokens)
            self.pipeline.learn(hidden[actual], tokens[actual], model, self.plan.step)


class KvplugMetadataBuilder(CPUAttentionMetadataBuilder):
    """Plans each step; owns the pipeline that its layers share."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        """Builds the pipeline and hands it to the layers.

        Raises:
            KvplugError: Options that do not fit the recipe, the page or the model, or layers of
                another kind.
        """
        refuse_builder(type(self), KvplugMetadataBuilder)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)
        config = options_of(vllm_config)
        self.pipeline = Pipeline(config, self.block_size, self.num_kv_heads)
        self.attend = CpuAttend(
            self.num_heads, self.num_kv_heads, self.head_dim, self.dtype, self.isa,
            self.kv_cache_dtype,
        )  # fmt: skip
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        for layer in layers.values():
            layer.impl.adopt(self.pipeline, self.attend)
        self.windowed = self.window_size != -1
        self.asked: Asked | None = None
        """By the requests of the next step; None where none asks for anything."""
        self.counts: RowCounts | None = None
        """Takes what each request of the next step attends to; None where none wants to know."""

    def _asked(self, rows: int) -> Asked | None:
        """The same, for padded rows too."""
        if self.asked is None or len(self.asked.budgets) == rows:
            return self.asked
        padding = (0, rows - len(self.asked.budgets))
        return Asked(
            np.pad(self.asked.budgets, padding, constant_values=EVERYTHING),
            np.pad(self.asked.targets, padding, constant_values=np.nan),
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KvplugMetadata:
        """Stock metadata plus the plan, where any window is sparse."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = KvplugMetadata(**vars(stock))
        common = common_attn_metadata
        if self.windowed or self.pipeline.stages.always_dense:
            return metadata
        if common.is_prefilling is None or common.causal is not True:
            raise KvplugError("kvplug serves causal decoding by vLLM's own model runner only.")
        batch = Batch(
            common.query_start_loc_cpu.numpy(), common.seq_lens.numpy(),
            common.is_prefilling.numpy(), common.block_table_tensor.numpy(),
            common.slot_mapping.numpy(), self._asked(common.num_reqs), self.counts,
        )  # fmt: skip
        self.counts = None  # what a drafter attends to is nobody's
        plan = self.pipeline.plan(batch)
        metadata.plan, metadata.pipeline = plan, self.pipeline
        if plan is not None and plan.table is not None and plan.by_kernel:
            pages = self.pipeline.attended(plan.table)
            metadata.calls = self.attend.schedule(plan.table.rows(pages=pages))
        return metadata
