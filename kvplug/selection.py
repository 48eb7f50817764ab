"""Whether an engine selected kvplug, and what it asked for: the reading of vLLM's config.

Imports no vLLM: a config is read by its attributes, so this file can sit below every other.
"""

from __future__ import annotations

from typing import Any

from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError

BACKEND_PATH = "kvplug.attention.backend.KvplugBackend"
OPTIONS_KEY = "kvplug"
DEFAULT_PAGE = 32


def is_selected(vllm_config: Any) -> bool:
    """Whether this engine runs kvplug's backend.

    Raises:
        KvplugError: kvplug's options are given without its backend, or another plugin holds it.
    """
    backend = vllm_config.attention_config.backend
    has_options = OPTIONS_KEY in additional_config(vllm_config)
    chosen = backend is not None and backend.name == "CUSTOM"
    if has_options and not chosen:
        raise KvplugError(
            "--additional-config names kvplug, but its backend is not selected: add "
            "--attention-backend CUSTOM."
        )
    if not chosen:
        return False
    path = backend.get_path()
    if path != BACKEND_PATH and has_options:
        raise KvplugError(
            f"The CUSTOM attention backend is held by {path}, so kvplug cannot serve: "
            f"uninstall that plugin or leave it out of VLLM_PLUGINS."
        )
    return bool(path == BACKEND_PATH)


def additional_config(vllm_config: Any) -> dict[str, Any]:
    """vLLM's ``--additional-config`` as a dict."""
    extra = vllm_config.additional_config
    return extra if isinstance(extra, dict) else {}


def options_of(vllm_config: Any) -> KvplugConfig:
    """The user's options, checked.

    Raises:
        KvplugError: See :meth:`KvplugConfig.parse`.
    """
    return KvplugConfig.parse(additional_config(vllm_config).get(OPTIONS_KEY, {}))
