"""What a patch is: one wrapped function of vLLM, and everything a maintainer must know of it."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """A wrapper around one function of vLLM."""

    target: str
    """``module:Class.function`` or ``module:function``."""
    vllm: str
    """Versions of vLLM that it was written for."""
    why: str
    """What goes wrong without it."""
    upstream: str
    """Where vLLM's side of the matter is discussed."""
    remove_when: str
    """What has to happen before it can go."""
    fingerprint: str
    """First 16 hex digits of the SHA-256 of the target's source."""
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    """Makes the replacement from the original."""
    device: str = "any"
    """vLLM's name of the device that it is for. On others its module is not even imported: that of
    the CPU worker replaces ``torch.cuda.Stream``, ``Tensor.pin_memory`` and more as it loads."""

    def owner(self) -> tuple[Any, str]:
        """The class or module that holds the target, and the target's name in it."""
        module, path = self.target.split(":")
        *classes, function = path.split(".")
        owner = importlib.import_module(module)
        return (getattr(owner, classes[0]) if classes else owner), function

    def found_fingerprint(self) -> str:
        """The fingerprint of the target as installed, which must not be patched yet."""
        owner, function = self.owner()
        source = inspect.getsource(inspect.unwrap(getattr(owner, function)))
        return hashlib.sha256(source.encode()).hexdigest()[:16]
