"""The backend class for CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.config.cache import CacheDType
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from kvplug.attention.device.impl import DeviceImpl
from kvplug.attention.device.metadata import DeviceMetadataBuilder
from kvplug.attention.device.refusals import PAGES
from kvplug.kernels.checks import HEAD_DIMS

if TYPE_CHECKING:
    from kvplug.config import OffloadConfig
    from kvplug.offload.host_store import HostStore


class DeviceBackend(TritonAttentionBackend):
    """vLLM's Triton backend with page retrieval; a page is vLLM's block."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """The registry member that the class is filed under."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> list[int | MultipleOf]:
        """Pages that the kernels take; vLLM's default of 16 becomes the smallest."""
        return list(PAGES)

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """See above: vLLM's block is kvplug's page, and is not cut."""
        return block_size is None or block_size in PAGES

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """What the kernels were tested for."""
        return head_size in HEAD_DIMS

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Causal models only."""
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        """No."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """No: windows are causal."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """No: windows see what came before them."""
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        """No."""
        return False

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Those that have bfloat16."""
        return capability >= DeviceCapability(8, 0)

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: windows are cut by what the host knows."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Nobody tried it."""
        return False

    @staticmethod
    def cold_store(offload: OffloadConfig, rank: int) -> HostStore:
        """Where a worker's cache lives if pages are offloaded, whatever its rank."""
        from kvplug.offload.host_store import HostStore

        return HostStore()

    @staticmethod
    def get_impl_cls() -> type[DeviceImpl]:
        """The layer implementation."""
        return DeviceImpl

    @staticmethod
    def get_builder_cls() -> type[DeviceMetadataBuilder]:
        """The per-step planner."""
        return DeviceMetadataBuilder
