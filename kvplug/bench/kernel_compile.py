"""Compiles every kernel for GPUs that need not be there: what each takes of a multiprocessor.

``python -m kvplug.bench.kernel_compile TARGET...`` prints JSON. It needs a process in which kernels
are not interpreted.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import kvplug.kernels
from kvplug.kernels.compile_check import TARGETS, Variant, compile_for


def variants() -> Iterator[tuple[str, Variant]]:
    """Files of kernels, and the variants that they list."""
    for module in pkgutil.iter_modules(kvplug.kernels.__path__):
        kernels = importlib.import_module(f"kvplug.kernels.{module.name}")
        yield from ((module.name, variant) for variant in getattr(kernels, "COMPILED", ()))


def compiled(targets: list[str]) -> Iterator[dict[str, Any]]:
    """Compiles every variant.

    Args:
        targets: Names of :data:`kvplug.kernels.compile_check.TARGETS`.

    Yields:
        ``file``, ``kernel``, ``constants``, and for each target what it takes.
    """
    for file, variant in variants():
        yield {
            "file": file,
            "kernel": variant.kernel.__name__.strip("_").removesuffix("_kernel"),
            "variant": ", ".join(_constants(variant)),
            "targets": {name: compile_for(variant, name)._asdict() for name in targets},
        }


def _constants(variant: Variant) -> Iterator[str]:
    """Types of pointers and constants, without those that are left out."""
    yield variant.types.split()[0].lstrip("*")
    for name, value in variant.constants.items():
        if value is not None:
            yield f"{name} {value}"
    yield f"{variant.num_warps} warps"


def main() -> None:
    """Prints what every variant takes on the targets named, or on all."""
    print(json.dumps(list(compiled(sys.argv[1:] or list(TARGETS)))))


if __name__ == "__main__":
    main()
