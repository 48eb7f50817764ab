"""Makes Triton's interpreter faster without changing what it does.

Before every call of a function on the device it looks through all of Triton's language for what to
put its own in place of. What there is never changes, so here it is found once.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from typing import Any


def remember_builtins() -> None:
    """Does so for the Triton that is imported, which must be one that interprets."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    is_builtin = interpreter.tl.core.is_builtin

    @cache
    def names(owner: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(owner) if is_builtin(member)]

    def patch(owner: Any, builder: Any, scope: Any) -> None:
        for name in names(owner):
            member = getattr(owner, name)
            if is_builtin(member):  # and not replaced already, further up in the call
                interpreter._patch_attr(owner, name, member, builder, scope)

    language = interpreter.tl
    described = language.core.tensor_descriptor_base
    for owner in (language, language.core, language.tensor, language.math, described):
        names(owner)  # now, while nothing is replaced
    interpreter._patch_builtin = patch
