"""``kvplug doctor``: what is live, and what would go wrong, before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from kvplug.machine import num_threads, versions


class Check(NamedTuple):
    """One line of the report."""

    name: str
    found: str
    problem: str | None


def diagnose() -> dict[str, Any]:
    """Runs every check; a failing one never stops the others.

    Returns:
        The JSON object of the public interface, plus ``checks``.
    """
    checks = [_run(name, check) for name, check in CHECKS.items()]
    found = {check.name: check.found for check in checks}
    return {
        "vllm": found["vLLM"],
        "platform": found["platform"],
        "backend_live": found["backend"] == "live",
        "problems": [check.problem for check in checks if check.problem],
        "checks": [check._asdict() for check in checks],
    }


def _run(name: str, check: Callable[[], tuple[str, str | None]]) -> Check:
    """Turns whatever a check raises into its problem."""
    try:
        return Check(name, *check())
    except Exception as error:
        return Check(name, "failed", f"{name}: {str(error) or type(error).__name__}")


def _vllm() -> tuple[str, str | None]:
    from kvplug.patches.apply import vllm_version

    return vllm_version(), None


def _platform() -> tuple[str, str | None]:
    from vllm.platforms import current_platform

    name = str(current_platform.device_type)
    served = current_platform.is_cpu() or current_platform.is_cuda()
    return name, None if served else f"kvplug serves CPUs and CUDA only; vLLM found {name!r} here."


def _transformers() -> tuple[str, str | None]:
    from transformers import LlamaForCausalLM

    return versions()["transformers"] if LlamaForCausalLM else "", None


def _plugin() -> tuple[str, str | None]:
    from importlib.metadata import entry_points

    names = [entry.name for entry in entry_points(group="vllm.general_plugins")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if "kvplug" not in names:
        return "not installed", "vLLM does not see kvplug: install it with pip in this environment."
    if allowed is not None and "kvplug" not in allowed.split(","):
        return "switched off", f"VLLM_PLUGINS={allowed!r} leaves kvplug out: add it."
    return "found by vLLM", None


def _patches() -> tuple[str, str | None]:
    from kvplug.patches.apply import all_patches, apply_all

    apply_all()
    return f"{len(all_patches())} applied", None


def _backend() -> tuple[str, str | None]:
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from kvplug.plugin import register
    from kvplug.selection import BACKEND_PATH, DEFAULT_PAGE

    register()
    selector = AttentionSelectorConfig(128, torch.bfloat16, "auto", DEFAULT_PAGE)
    path = current_platform.get_attn_backend_cls(AttentionBackendEnum.CUSTOM, selector)
    # On CUDA vLLM names the class behind the path.
    if path != BACKEND_PATH and not path.startswith("kvplug.attention.device."):
        return path, f"--attention-backend CUSTOM gives {path}, not kvplug's backend."
    return "live", None


def _threads() -> tuple[str, str | None]:
    import numba

    cores, ours = num_threads(), numba.config.NUMBA_NUM_THREADS
    problem = None
    if ours < cores and "NUMBA_NUM_THREADS" in os.environ:
        problem = f"NUMBA_NUM_THREADS={ours} leaves cores idle while pages are scored; unset it."
    return f"{cores} cores, {ours} for scoring", problem


CHECKS: dict[str, Callable[[], tuple[str, str | None]]] = {
    "vLLM": _vllm,
    "platform": _platform,
    "transformers": _transformers,
    "plugin": _plugin,
    "patches": _patches,
    "backend": _backend,
    "threads": _threads,
}
