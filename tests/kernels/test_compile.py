"""Every kernel compiles for the GPUs it is meant for, within what a program may take of one.

Compiling needs no GPU, but a process in which kernels are not interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvplug.kernels.compile_check import Variant, compile_for

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program can have (CUDA and ROCm programming guides)."""

PROGRAM = """
import importlib, json, sys
from pathlib import Path
from kvplug.kernels.compile_check import compile_for
usage = {}
for path in sorted(Path("kernels").glob("*.py")):
    kernels = importlib.import_module(f"kvplug.kernels.{path.stem}")
    for variant in getattr(kernels, "COMPILED", ()):
        for target in sys.argv[1:]:
            usage[f"{target} {variant.label}"] = compile_for(variant, target)
print(json.dumps(usage))
"""


@pytest.fixture(scope="module")
def usage() -> dict[str, list[int]]:
    """What each variant takes on each target: shared bytes, registers, spills."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *SHARED],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_compiles(usage: dict[str, list[int]]) -> None:
    """Every decorated kernel that a launcher calls has a variant, and each one compiled."""
    compiled = {label.split()[1].partition("(")[0] for label in usage}
    launched = {
        line.strip().partition("[")[0].split()[-1]
        for path in (ROOT / "kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if "_kernel[" in line
    }
    assert launched == compiled


def test_no_kernel_takes_more_than_there_is(usage: dict[str, list[int]]) -> None:
    """Nothing is kept in local memory, where every access is one to device memory."""
    wrong = {
        label: taken
        for label, taken in usage.items()
        if taken[0] > SHARED[label.split()[0]] or taken[1] == 0 or taken[2]
    }
    assert not wrong


def test_a_variant_that_does_not_fit_its_kernel_is_refused() -> None:
    class Kernel:
        __name__ = "add"
        arg_names = ("p_x", "n", "BLOCK")

    with pytest.raises(ValueError, match=r"needs a type for each of \['p_x', 'n'\]"):
        compile_for(Variant(Kernel(), "*fp32", {"BLOCK": 1}), "sm_90")
