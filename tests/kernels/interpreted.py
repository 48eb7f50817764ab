"""A Triton of their own for kernels where there is no GPU: one that interprets them.

Whether a function is interpreted is decided when it is decorated, for Triton's own library when
Triton is first imported. Other tests may have imported it before, and must not find their kernels
interpreted after. So kernels are imported here with a second copy of Triton's Python modules, which
stands in the first one's place while they are imported and while their tests run.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from tests.interpreter import remember_builtins

VARIABLE = "TRITON_INTERPRET"
KERNELS = Path(__file__).resolve().parents[2] / "kernels"

_copy: dict[str, ModuleType] = {}


def _take(*packages: str) -> dict[str, ModuleType]:
    """Takes packages out of the modules, all but what is compiled, which can be loaded only once.

    Returns:
        What was taken.
    """
    names = [
        name
        for name in sys.modules
        if any(name == package or name.startswith(f"{package}.") for package in packages)
        and not name.startswith("triton._C")
    ]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def interpreted() -> Iterator[None]:
    """The second copy is in place; behind it, everything is as it was."""
    before, others = os.environ.get(VARIABLE), _take("triton")
    os.environ[VARIABLE] = "1"
    sys.modules.update(_copy)
    try:
        yield
    finally:
        _copy.update(_take("triton"))
        sys.modules.update(others)
        # Under some name, or Python does not take them apart at its end, and nanobind tells of it.
        sys.modules.update({f"interpreted.{name}": module for name, module in _copy.items()})
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def import_kernels() -> None:
    """Imports every kernel anew, to be interpreted; whoever imports one later finds this one.

    Once, whichever folder of tests asks first.
    """
    if _copy:
        return
    _take("kvplug.kernels")
    with interpreted():
        remember_builtins()
        for path in sorted(KERNELS.glob("*.py")):
            importlib.import_module(f"kvplug.kernels.{path.stem}")
