"""``kvplug doctor``: what is live, and what would go wrong, before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kvplug.errors import KvplugError
from kvplug.machine import num_threads, versions
from kvplug.selection import DEFAULT_PAGE

SOME_PAGE = 2 * 2 * DEFAULT_PAGE * 128
"""Bytes of a page of one KV head of 128 numbers, in 16 bits: read where no model is named."""


class Check(NamedTuple):
    """One line of the report."""

    name: str
    found: str
    problem: str | None


def diagnose(folder: Path | None = None, model: str | None = None) -> dict[str, Any]:
    """Runs every check; a failing one never stops the others.

    Args:
        folder: Checked too, as one to offload to.
        model: Path or name of a model, for the size of its pages and the least hot pool.

    Returns:
        The JSON object of the public interface, plus ``checks``, and ``offload`` (name of the check
        -> what was found) where a folder or a model is given.
    """
    asked = _offload_checks(folder, model)
    checks = [_run(name, check) for name, check in {**CHECKS, **asked}.items()]
    found = {check.name: check.found for check in checks}
    offload = {"offload": {name: found[name] for name in asked}} if asked else {}
    return {
        **offload,
        "vllm": found["vLLM"],
        "platform": found["platform"],
        "backend_live": found["backend"] == "live",
        "problems": [check.problem for check in checks if check.problem],
        "checks": [check._asdict() for check in checks],
    }


def _offload_checks(
    folder: Path | None, model: str | None
) -> dict[str, Callable[[], tuple[str, str | None]]]:
    """Checks of a folder and of a model."""
    checks: dict[str, Callable[[], tuple[str, str | None]]] = {}
    if folder is not None:
        checks["offload folder"] = lambda: _folder(folder)
        checks["offload reads"] = lambda: _reads(folder, model)
    if model is not None:
        checks["least hot_gib"] = lambda: _least_hot(model)
    return checks


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
    from kvplug.selection import BACKEND_PATH

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


def _folder(folder: Path) -> tuple[str, str | None]:
    from kvplug.offload.cold_store import GIB, check_folder, file_system

    kind = file_system(folder)
    free = "no such folder"
    if folder.is_dir():
        status = os.statvfs(folder)
        room = status.f_bavail * status.f_frsize / GIB
        free = f"{kind or 'unknown file system'}, {room:.1f} GiB free"
    try:
        check_folder(str(folder), 0)
    except KvplugError as error:
        return free, str(error)
    return free, None


def _reads(folder: Path, model: str | None) -> tuple[str, str | None]:
    from kvplug.offload.cold_store import GIB
    from kvplug.offload.read_speed import measure_reads

    block = SOME_PAGE if model is None else _sizes(model).page_bytes
    speed = measure_reads(folder, block, num_threads())
    return (
        f"{block / 1024:g} KiB each: {speed.latency_s * 1e6:.0f} us one after the other, "
        f"{speed.bytes_per_s / GIB:.2f} GiB/s by {num_threads()} threads"
    ), None


def _least_hot(model: str) -> tuple[str, str | None]:
    from kvplug.config import KvplugConfig
    from kvplug.offload.setup import least_hot_gib

    config, sizes = KvplugConfig.parse({}), _sizes(model)
    layers = sizes.num_layers - len(config.resolve_dense_layers(sizes.num_layers))
    least = least_hot_gib(config, DEFAULT_PAGE, sizes.num_kv_heads, layers, sizes.page_bytes)
    return f"{least:g} with the default options, on one worker", None


class _Sizes(NamedTuple):
    """Of a model's cache."""

    num_layers: int
    num_kv_heads: int
    page_bytes: int
    """Of a page of one KV head, keys and values, in 16 bits."""


def _sizes(model: str) -> _Sizes:
    """Sizes of a model, of its config alone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return _Sizes(config.num_hidden_layers, kv_heads, 2 * 2 * DEFAULT_PAGE * dim)


CHECKS: dict[str, Callable[[], tuple[str, str | None]]] = {
    "vLLM": _vllm,
    "platform": _platform,
    "transformers": _transformers,
    "plugin": _plugin,
    "patches": _patches,
    "backend": _backend,
    "threads": _threads,
}
