"""Lets vLLM's CPU worker start in a process that has imported numba."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from kvplug.patches.record import Patch


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _rebind_kernels(overrides: Any) -> None:
        names = [name for name in sys.modules if name.partition(".")[0] == "llvmlite"]
        hidden = {name: sys.modules.pop(name) for name in names}
        try:
            original(overrides)
        finally:
            sys.modules.update(hidden)

    return _rebind_kernels


PATCHES = [
    Patch(
        target="vllm.triton_utils.dispatcher:_rebind_kernels",
        vllm=">=0.32,<0.33",
        why="It reads vars() of everything in every module; llvmlite's library handle, which "
        "numba imports, answers any attribute with a function, and the worker dies with "
        "\"'_lib_fn_wrapper' object has no attribute 'get'\". llvmlite holds no Triton kernels.",
        upstream="none known; seen with numba 0.65 and any vLLM feature that imports it first",
        remove_when="_rebind_kernels skips attributes whose vars() is no dict.",
        fingerprint="68f705141997c1e3",
        wrap=_wrap,
        device="cpu",
    )
]
