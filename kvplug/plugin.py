"""The entry point ``vllm.general_plugins``: the one place that wires kvplug into vLLM.

vLLM calls :func:`register` in every process, some more than once.
"""

from __future__ import annotations


def register() -> None:
    """Registers the backend and applies the patches; repeated calls do nothing.

    An engine that does not select kvplug behaves as if it were not installed: each patch asks
    first. Should another plugin hold the CUSTOM backend already, it keeps it, and only an engine
    that asks for kvplug is refused.

    Raises:
        KvplugError: vLLM's version is outside the supported range, or a patched function has
            changed.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvplug.patches.apply import apply_all
    from kvplug.selection import BACKEND_PATH

    apply_all()
    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
