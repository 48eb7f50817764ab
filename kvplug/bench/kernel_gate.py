"""Whether every kernel does on this device what its twin does: nothing is timed before.

``python -m kvplug.bench.kernel_gate`` prints the same as JSON. Under ``TRITON_INTERPRET=1`` it
needs no device, and tries tiny shapes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from kvplug.bench.kernel_attention_cases import ATTENTION_CASES
from kvplug.bench.kernel_bucket_cases import BUCKET_CASES
from kvplug.bench.kernel_cases import INDEX_CASES
from kvplug.bench.kernel_channel_cases import CHANNEL_CASES
from kvplug.bench.kernel_chunk_cases import CHUNK_CASES
from kvplug.bench.kernel_density_cases import DENSITY_CASES
from kvplug.bench.kernel_mass_cases import MASS_CASES
from kvplug.bench.kernel_pool_cases import POOL_CASES
from kvplug.bench.kernel_steps import check_step
from kvplug.bench.kernel_world import Case, Outputs, Shape, World

CASES = (
    *INDEX_CASES, *CHANNEL_CASES, *CHUNK_CASES, *MASS_CASES, *BUCKET_CASES, *DENSITY_CASES,
    *ATTENTION_CASES, *POOL_CASES,
)  # fmt: skip


class Finding(NamedTuple):
    """What one kernel did at one shape."""

    kernel: str
    shape: str
    rule: str
    """``bits``, or ``error`` where rounding decides."""
    error: float
    """Largest error against the twin in float64; of exact kernels, numbers that differ."""
    allowed: float
    """The largest that passes."""
    problem: str | None = None
    """Why it could not even run."""

    @property
    def is_right(self) -> bool:
        """Whether it passes."""
        return self.problem is None and self.error <= self.allowed


def shapes(interpreted: bool) -> list[Shape]:
    """Shapes to try: every page and head size, groups of 1, 3, 4 and 8, both 16-bit dtypes.

    Args:
        interpreted: Tiny ones, in float16: the interpreter cuts bfloat16 off instead of rounding.
    """
    half = torch.float16
    if interpreted:
        sizes = {"window": 16, "chunk": 64, "sink": 16, "local": 40, "budget": 64}
        return [
            Shape(2, 300, 6, 2, 80, 16, half, **sizes),
            Shape(1, 530, 4, 1, 64, 32, half, **sizes),
        ]
    brain = torch.bfloat16
    return [
        Shape(3, 3001, 32, 8, 128, 32, brain, chunk=1024, budget=1024),
        Shape(2, 9000, 24, 8, 80, 16, half, chunk=1024, budget=512),
        Shape(1, 5000, 4, 4, 64, 64, brain, chunk=512, budget=512),
        Shape(2, 4097, 8, 1, 256, 128, half, chunk=512, budget=1024),
        Shape(5, 2500, 12, 4, 96, 32, brain, chunk=512, budget=256),
        # More far pages than one program ranks.
        Shape(1, 140_000, 4, 1, 128, 32, brain, chunk=256),
    ]


def describe(shape: Shape) -> str:
    """A shape in words."""
    dtype = str(shape.dtype).removeprefix("torch.")
    return (
        f"{shape.batch} x {shape.tokens:,} tokens, {shape.heads}/{shape.kv_heads} heads of "
        f"{shape.dim}, page {shape.page}, {dtype}"
    )


def check_case(case: Case) -> tuple[float, float]:
    """Runs a kernel and its twin.

    Returns:
        The largest error, or numbers that differ, and what passes.
    """
    found, plain = ([tensor.clone() for tensor in case.outputs] for _ in range(2))
    case.call(case.kernel, found)
    case.call(case.twin, plain)
    if case.is_exact:
        return float(sum(map(differing, found, plain))), 0.0
    exact = [t.double() if t.is_floating_point() else t.clone() for t in case.outputs]
    case.call(case.twin, exact)
    return worst_error(found, plain, exact)


def differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    """Numbers of two tensors whose bits differ."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    return int((found.view(width) != expected.view(width)).sum())


def worst_error(found: Outputs, plain: Outputs, exact: Outputs) -> tuple[float, float]:
    """The error that is largest beside what passes: twice plain torch's, and rounding once.

    Args:
        found: By the kernel.
        plain: By the twin.
        exact: By the twin in float64.
    """
    worst = (0.0, 0.0)
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        known = right.isfinite()
        if not torch.equal(ours.isfinite(), known):
            return torch.inf, 0.0
        if not known.any():
            continue
        error = float((ours.double() - right)[known].abs().max())
        plain_error = float((theirs.double() - right)[known].abs().max())
        # Plain torch may happen to be exact where another order of sums is not.
        unit = float(torch.finfo(ours.dtype).eps) if ours.is_floating_point() else 0.0
        allowed = 2 * plain_error + unit * float(right[known].abs().max())
        if error * max(worst[1], 1e-300) >= worst[0] * allowed:
            worst = (error, allowed)
    return worst


def check_kernels(
    device: torch.device, say: Callable[[str], None], interpreted: bool = False
) -> Iterator[Finding]:
    """Tries every kernel, and the step that strings them, at every shape.

    Args:
        device: Where.
        say: Told of each shape.
        interpreted: Whether shapes must be tiny.
    """
    for shape in shapes(interpreted):
        words = describe(shape)
        say(f"gate: {words}")
        for make in CASES:
            yield _finding(make, shape, device, words)
        yield from _step_findings(shape, device, words)


def _step_findings(shape: Shape, device: torch.device, words: str) -> Iterator[Finding]:
    """The step at one shape."""
    try:
        for name, found, plain, exact in check_step(shape, device):
            error, allowed = worst_error([found], [plain], [exact])
            yield Finding(f"decode step, {name}", words, "error", error, allowed)
    except Exception as problem:  # whatever stops it, a kernel is wrong
        yield Finding("decode step", words, "error", 0.0, 0.0, in_a_line(problem))


def in_a_line(problem: Exception) -> str:
    """The first line of what an exception says, or its kind."""
    return (str(problem).strip() or type(problem).__name__).split("\n")[0]


def _finding(
    make: Callable[[World], Case], shape: Shape, device: torch.device, words: str
) -> Finding:
    """One kernel at one shape."""
    case = make(World(shape, device))
    rule = "bits" if case.is_exact else "error"
    try:
        error, allowed = check_case(case)
    except Exception as problem:  # whatever stops it, the kernel is wrong
        return Finding(case.name, words, rule, 0.0, 0.0, in_a_line(problem))
    return Finding(case.name, words, rule, error, allowed)


def report(findings: list[Finding]) -> dict[str, Any]:
    """The findings as what a document holds."""
    return {
        "checked": len(findings),
        "wrong": [finding._asdict() for finding in findings if not finding.is_right],
        "kernels": sorted({finding.kernel for finding in findings}),
        "shapes": list(dict.fromkeys(finding.shape for finding in findings)),
    }


def main() -> None:
    """Prints the report of this process's device, or of the interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.device("cpu" if interpreted else "cuda")
    findings = list(check_kernels(device, lambda _: None, interpreted))
    print(json.dumps(report(findings)))


if __name__ == "__main__":
    main()
