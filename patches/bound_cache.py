"""Binds layers to their cache once it exists, and checks that kvplug is live in every one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvplug.binding import bind_layers
from kvplug.patches.record import Patch


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        from vllm.config import set_current_vllm_config

        original(self, kv_cache_configs)
        with set_current_vllm_config(self.vllm_config):
            bind_layers(self.vllm_config, self.worker.get_model())

    return initialize_from_config


PATCHES = [
    Patch(
        target="vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config",
        vllm=">=0.32,<0.33",
        why="Backends are not told when their layers' caches are allocated, and an ignored "
        "backend is only a line at INFO level: kvplug must refuse to serve without itself.",
        upstream="https://github.com/vllm-project/vllm/issues/42449",
        remove_when="AttentionImpl gets a hook that hands it its KV cache.",
        fingerprint="3b298834beaea7f5",
        wrap=_wrap,
    )
]
