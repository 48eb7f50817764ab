"""Makes vLLM's CPU platform honour ``--attention-backend CUSTOM``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvplug.errors import KvplugError
from kvplug.patches.record import Patch
from kvplug.selection import BACKEND_PATH


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        custom = selected_backend is not None and selected_backend.name == "CUSTOM"
        if not custom or selected_backend.get_path() != BACKEND_PATH:
            return str(original(cls, selected_backend, attn_selector_config, *args, **kwargs))
        _refuse_unserved(attn_selector_config)
        return BACKEND_PATH

    return get_attn_backend_cls


def _refuse_unserved(selector: Any) -> None:
    """Refuses a layer that kvplug's backend would not serve.

    Raises:
        KvplugError: With vLLM's own reasons.
    """
    from kvplug.attention.backend import KvplugBackend

    reasons = KvplugBackend.validate_configuration(device_capability=None, **selector._asdict())
    if reasons:
        raise KvplugError(f"kvplug cannot serve this model: {'; '.join(reasons)}.")


PATCHES = [
    Patch(
        target="vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
        vllm=">=0.32,<0.33",
        why="The CPU platform ignores every backend but its own, with a line at INFO level.",
        upstream="https://github.com/vllm-project/vllm/issues/57566",
        remove_when="CpuPlatform.get_attn_backend_cls honours registered backends.",
        fingerprint="b6eba62a9afd4d18",
        wrap=_wrap,
        device="cpu",
    )
]
