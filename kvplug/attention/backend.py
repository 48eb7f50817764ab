"""The backend class that ``--attention-backend CUSTOM`` names."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from kvplug.attention.impl import KvplugImpl
from kvplug.attention.metadata import KvplugMetadataBuilder
from kvplug.errors import KvplugError
from kvplug.selection import DEFAULT_PAGE, page_of

if not current_platform.is_cpu():
    raise KvplugError(
        f"This version of kvplug serves vLLM on CPUs only, not on {current_platform.device_name}."
    )


class KvplugBackend(CPUAttentionBackend):
    """vLLM's CPU backend with page retrieval.

    vLLM's cache manager works in blocks of one window, so prefix hits and cached blocks are whole
    windows (design rule 4); the kernel works in pages, which vLLM calls kernel blocks.
    """

    @staticmethod
    def get_name() -> str:
        """The registry member that the class is filed under."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """The page size, and nothing else."""
        config = get_current_vllm_config_or_none()
        return [DEFAULT_PAGE if config is None else page_of(config)]

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Causal models only."""
        return False

    @staticmethod
    def get_impl_cls() -> type[KvplugImpl]:
        """The layer implementation."""
        return KvplugImpl

    @staticmethod
    def get_builder_cls() -> type[KvplugMetadataBuilder]:
        """The per-step planner."""
        return KvplugMetadataBuilder
