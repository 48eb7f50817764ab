"""The backend class for CPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from kvplug.attention.impl import KvplugImpl
from kvplug.attention.metadata import KvplugMetadataBuilder

if TYPE_CHECKING:
    from kvplug.config import OffloadConfig
    from kvplug.offload.cold_store import ColdStore


class CpuBackend(CPUAttentionBackend):
    """vLLM's CPU backend with page retrieval; a page is vLLM's block."""

    @staticmethod
    def get_name() -> str:
        """The registry member that the class is filed under."""
        return "CUSTOM"

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Causal models only."""
        return False

    @staticmethod
    def cold_store(offload: OffloadConfig, rank: int) -> ColdStore:
        """Where a worker's cache lives if pages are offloaded; see :class:`ColdStore`."""
        from kvplug.offload.cold_store import ColdStore

        return ColdStore(offload, rank)

    @staticmethod
    def get_impl_cls() -> type[KvplugImpl]:
        """The layer implementation."""
        return KvplugImpl

    @staticmethod
    def get_builder_cls() -> type[KvplugMetadataBuilder]:
        """The per-step planner."""
        return KvplugMetadataBuilder
