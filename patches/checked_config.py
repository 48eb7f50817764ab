"""Checks an engine that selects kvplug where vLLM completes its config, before anything starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvplug.patches.record import Patch
from kvplug.startup import adopt


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        adopt(vllm_config)

    return check_and_update_config


TARGETS = {
    "cpu": ("vllm.platforms.cpu:CpuPlatform.check_and_update_config", "d2960ad5d1836767"),
    "cuda": ("vllm.platforms.cuda:CudaPlatformBase.check_and_update_config", "6eaf6d314aefb761"),
}
"""Targets and fingerprints by vLLM's name of the device; a build for one cannot import others."""


def _patch(device: str, target: str, fingerprint: str) -> Patch:
    return Patch(
        target=target,
        vllm=">=0.32,<0.33",
        why="General plugins have no hook at config time: bad options would surface only in a "
        "worker, after the weights are loaded, and the block size could not become one window.",
        upstream="https://github.com/vllm-project/vllm/issues/57566",
        remove_when="vLLM lets a plugin see the config before engines start.",
        fingerprint=fingerprint,
        wrap=_wrap,
        device=device,
    )


PATCHES = [_patch(device, *target) for device, target in TARGETS.items()]
