"""The entry point ``vllm.general_plugins``: the one place that wires kvplug into vLLM.

vLLM calls :func:`register` in every process, some more than once.
"""

from __future__ import annotations


def register() -> None:
    """Registers the backend and applies the patches; repeated calls do nothing.

    An engine that does not select kvplug behaves as if it were not installed: each patch asks
    first. Should another plugin hold the CUSTOM backend already, it keeps it, and only an engine
    that asks for kvplug is refused. The same goes for a vLLM that kvplug was not written for.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvplug.errors import KvplugError
    from kvplug.patches.apply import apply_all, refuse_when_selected
    from kvplug.selection import BACKEND_PATH

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    try:
        apply_all()
    except KvplugError as error:
        refuse_when_selected(error)
