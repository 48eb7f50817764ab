"""Sections of ``docs/gpu.md``: kernels checked and timed on a GPU, or verified without one."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvplug.errors import KvplugError

Say = Callable[[str], None]
Document = dict[str, Any]
PACKAGES = ("kvplug", "torch", "triton", "flashinfer-python")
"""Whose versions decide a figure."""
NO_DEVICE = (
    "No CUDA or ROCm device is there to time kernels on: --interpret verifies them in Triton's "
    "interpreter and --compile compiles them for sm_80, sm_90 and gfx942, both without a GPU."
)


@dataclass(frozen=True)
class Plan:
    """What is measured on a GPU."""

    contexts: list[int]
    batches: list[int]
    budgets: list[int]
    """Far tokens per request and KV head."""
    repeats: int
    """Runs that a median is of."""


def versions() -> dict[str, str]:
    """Versions of the packages that decide a figure; absent ones are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def header() -> Document:
    """What every section begins with."""
    return {"command": command_line(), "versions": versions()}


def command_line() -> str:
    """The command that runs."""
    name = "kvplug" if Path(sys.argv[0]).name == "kvplug" else "python -m kvplug.bench.kernels"
    return f"{name} {shlex.join(sys.argv[1:])}".strip()


def in_process(module: str, interpreted: bool) -> Any:
    """What ``python -m MODULE`` prints as JSON, with Triton's interpreter or without.

    Which of the two is decided when Triton is imported, hence the process of its own.

    Raises:
        KvplugError: It failed; the message has its last words.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise KvplugError(f"{module} failed: {words[-1].strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def interpreted() -> Document:
    """The gate and the step, in Triton's interpreter.

    Raises:
        KvplugError: A kernel is wrong.
    """
    section = in_process("kvplug.bench.kernel_gate", interpreted=True)
    refuse_wrong(section, "in Triton's interpreter")
    return header() | section


def compiled() -> Document:
    """What every kernel takes of a multiprocessor.

    Raises:
        KvplugError: One does not compile.
    """
    return header() | {"rows": in_process("kvplug.bench.kernel_compile", interpreted=False)}


def measured(plan: Plan, say: Say, keep: Callable[[Document], None]) -> Document:
    """Checks the kernels on the device, then times them.

    Args:
        plan: What is timed.
        say: Told of what comes next.
        keep: Given what there is, after every figure of the step.

    Raises:
        KvplugError: There is no device, or a kernel is wrong on it; then nothing is timed.
    """
    import torch

    if not torch.cuda.is_available():
        raise KvplugError(NO_DEVICE)
    from kvplug.bench.dense_decode import has_flashinfer
    from kvplug.bench.gpu_timer import GpuTimer
    from kvplug.bench.kernel_gate import check_kernels, report
    from kvplug.bench.kernel_measure import measure_kernels, measure_steps
    from kvplug.bench.step_bytes import StepSize

    device = torch.device("cuda")
    gate = report(list(check_kernels(device, say)))
    refuse_wrong(gate, "on this device")
    timer = GpuTimer(device, plan.repeats)
    ceiling = timer.copy_bandwidth()
    size = StepSize(8, 131072, plan.budgets[-1])
    section: Document = header() | {
        "device": torch.cuda.get_device_name(device), "ceiling": ceiling, "gate": gate,
        "repeats": plan.repeats, "flashinfer": has_flashinfer(), "size": size._asdict(),
        "kernels": list(measure_kernels(size, timer, ceiling, say)), "steps": [],
    }  # fmt: skip
    for row in measure_steps(plan.contexts, plan.batches, plan.budgets, timer, ceiling, say):
        section["steps"].append(row)
        keep(section)
    return section


def refuse_wrong(gate: Document, where: str) -> None:
    """Ends a run in which a kernel is wrong.

    Raises:
        KvplugError: One is; it is named with what it did.
    """
    if not gate["wrong"]:
        return
    first, *others = gate["wrong"]
    found = first["problem"] or f"error {first['error']:.3g}, allowed {first['allowed']:.3g}"
    more = f" ({len(others)} more are wrong)" if others else ""
    raise KvplugError(
        f"Kernel {first['kernel']} is wrong {where} at {first['shape']}: {found}{more}. "
        "Nothing was timed."
    )
