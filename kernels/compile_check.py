"""Compiles kernels for GPUs that need not be there, to see that they compile and what they take.

Triton's compiler needs no device: it goes down to machine code for any target. Interpreted
kernels (``TRITON_INTERPRET=1``) cannot be compiled, so this needs a process without it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""Names of GPUs that kernels are meant for: A100, H100 and H200, MI300."""
ALIGNMENT = 16
"""Bytes that addresses are multiples of, as torch allocates them."""


class Variant(NamedTuple):
    """One way in which a launcher calls a kernel."""

    kernel: Any
    """The decorated function."""
    types: str
    """Types of its arguments before the constants, in order: ``*bf16 *i64 i32 fp32``."""
    constants: dict[str, Any]
    """Its ``tl.constexpr`` arguments by name. None stands for a pointer that is left out: name it
    here and leave it out of ``types``."""
    num_warps: int = 4
    num_stages: int = 3

    @property
    def label(self) -> str:
        """The kernel's name and constants, to be told from others."""
        values = ", ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel.__name__}({self.types}; {values})"


class Usage(NamedTuple):
    """What a compiled kernel takes of a multiprocessor."""

    shared: int
    """Bytes of shared memory per program."""
    registers: int
    """Registers per thread; on AMD GPUs vector registers."""
    spilled: int
    """Bytes of local memory per thread; on AMD GPUs vector registers that did not fit."""


def compile_for(variant: Variant, target: str) -> Usage:
    """Compiles a variant and says what it takes.

    Args:
        variant: Kernel and arguments.
        target: A name of :data:`TARGETS`.

    Raises:
        ValueError: The types do not match the kernel's arguments.
        triton.CompilationError: It does not compile.
    """
    names = list(variant.kernel.arg_names)
    plain = [name for name in names if name not in variant.constants]
    types = variant.types.split()
    if len(types) != len(plain) or not variant.constants.keys() <= set(names):
        raise ValueError(
            f"{variant.label} needs a type for each of {plain} and no other constants, "
            f"not {len(types)} types."
        )
    signature = dict.fromkeys(names, "constexpr") | dict(zip(plain, types, strict=True))
    aligned = {
        (index,): [["tt.divisibility", ALIGNMENT]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(variant.kernel, signature, variant.constants, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if "amdgcn" in compiled.asm:
        registers, spilled = _amd_usage(compiled.asm["amdgcn"])
    else:
        registers, spilled = _nvidia_usage(compiled.asm["cubin"])
    return Usage(compiled.metadata.shared, registers, spilled)


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and how many of them were spilled."""
    counts = [re.search(rf"\.vgpr_{name}:\s+(\d+)", assembly) for name in ("count", "spill_count")]
    registers, spilled = (int(found[1]) if found else 0 for found in counts)
    return registers, spilled


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.check_output([tool, "--dump-resource-usage", str(path)], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", report)
    if not found:
        raise ValueError(f"cuobjdump reports no registers: {report!r}.")
    return int(found[1]), max(int(found[2]), int(found[3]))
