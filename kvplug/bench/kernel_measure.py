"""Times kernels and the decode attention step on a GPU, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kvplug.bench.dense_decode import FLASHINFER, kinds
from kvplug.bench.gpu_timer import GpuTimer, captured
from kvplug.bench.kernel_gate import CASES, in_a_line
from kvplug.bench.kernel_steps import inputs_of, regions_of, step_of
from kvplug.bench.kernel_world import Shape, World
from kvplug.bench.step_bytes import StepSize

Say = Callable[[str], None]
Row = dict[str, Any]
SPARE = 3 * 2**30
"""Bytes of device memory left for scratch, for torch and for FlashInfer."""


def shape_of(size: StepSize) -> Shape:
    """The step's sizes as kernels are called with them."""
    return Shape(
        size.batch, size.context, size.heads, size.kv_heads, size.dim, size.page, torch.bfloat16,
        sink=size.sink, local=size.local, budget=size.budget,
    )  # fmt: skip


def measure_kernels(size: StepSize, timer: GpuTimer, ceiling: float, say: Say) -> Iterator[Row]:
    """Times every kernel by itself.

    Args:
        size: Contexts that they work on.
        timer: Of the device.
        ceiling: Bytes per second of a copy.
        say: Told of each kernel.

    Yields:
        ``kernel``, ``seconds``, ``moved`` bytes, ``bandwidth`` in bytes per second and its
        ``share`` of the copy's.
    """
    for make in CASES:
        case = make(World(shape_of(size), timer.device))
        say(f"timing {case.name}")
        # Bound here, since the loop goes on before the function is forgotten.
        seconds = timer.seconds(lambda case=case: case.call(case.kernel, case.outputs))  # type: ignore[misc]
        bandwidth = case.moved / seconds
        yield {
            "kernel": case.name, "seconds": seconds, "moved": case.moved, "bandwidth": bandwidth,
            "share": bandwidth / ceiling,
        }  # fmt: skip
        del case
        torch.cuda.empty_cache()


def measure_steps(
    contexts: Sequence[int], batches: Sequence[int], budgets: Sequence[int], timer: GpuTimer,
    ceiling: float, say: Say,
) -> Iterator[Row]:  # fmt: skip
    """Times the whole step and dense attention, at every combination that fits the memory.

    Args:
        contexts: Tokens of each request.
        batches: Requests.
        budgets: Far tokens per request and KV head.
        timer: Of the device.
        ceiling: Bytes per second of a copy.
        say: Told of each combination.

    Yields:
        See :func:`step_row`; or ``context``, ``batch``, ``budget`` and why it was ``skipped``.
    """
    for context in contexts:
        for batch in batches:
            sizes = [StepSize(batch, context, budget) for budget in budgets]
            say(f"timing {context:,} tokens x {batch}")
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(timer.device)
            reason = does_not_fit(sizes[0], free)
            if reason:
                yield from (_names(size) | {"skipped": reason} for size in sizes)
                continue
            dense = measure_dense(sizes[0], timer, say)
            world = World(shape_of(sizes[0]), timer.device)
            inputs = inputs_of(world, [context] * batch)
            for size in sizes:
                regions = regions_of(shape_of(size), size.budget // size.page, size.dense_below)
                step = step_of(world.shape, regions, timer.device)

                def work(step: Any = step, inputs: Any = inputs) -> None:
                    step(*inputs)

                queued, replayed = timer.seconds(work), timer.seconds(captured(work))
                yield step_row(size, dense, queued, replayed, ceiling)
            del world, inputs, step, work


def measure_dense(size: StepSize, timer: GpuTimer, say: Say) -> dict[str, float | None]:
    """Seconds of each kind of dense attention; those of torch also as CUDA graphs.

    A kind that cannot run is None, and ``say`` is told why.
    """
    seconds: dict[str, float | None] = {}
    for name, make in kinds(size, timer.device).items():
        try:
            seconds |= _measure_kind(name, make, timer)
        except Exception as problem:  # another's code: whatever stops it, the others are measured
            seconds[name] = None
            say(f"{name} failed: {in_a_line(problem)}")
        torch.cuda.empty_cache()
    return seconds


def _measure_kind(
    name: str, make: Callable[[], Callable[[], object]], timer: GpuTimer
) -> dict[str, float]:
    """Seconds of one kind, whose memory is free again on return."""
    work = make()
    seconds = {name: timer.seconds(work)}
    if name != FLASHINFER:
        seconds[f"{name}, graph"] = timer.seconds(captured(work))
    return seconds


def does_not_fit(size: StepSize, free: int) -> str | None:
    """Why a combination is left out, in words; None if it fits.

    Args:
        size: Of the step.
        free: Bytes of the device.
    """
    needed = size.memory_bytes + SPARE
    if needed <= free:
        return None
    return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _names(size: StepSize) -> Row:
    """What a row is told from others by."""
    return {"context": size.context, "batch": size.batch, "budget": size.budget}


def step_row(
    size: StepSize, dense: dict[str, float | None], queued: float, replayed: float, ceiling: float
) -> Row:
    """What was measured at one combination.

    Args:
        size: Of the step.
        dense: Seconds of each kind of dense attention, None where one could not run.
        queued: Seconds of the step, its kernels launched one by one.
        replayed: Seconds of the step as a CUDA graph.
        ceiling: Bytes per second of a copy.

    Returns:
        ``context``, ``batch``, ``budget``, ``dense``, ``dense_best`` seconds, ``step`` and
        ``step_graph`` seconds, ``speedup`` of the graph over the best dense, ``hash_bytes``,
        ``kv_bytes``, ``floor`` seconds at the copy's bandwidth and ``over_floor``.
    """
    best = min((seconds for seconds in dense.values() if seconds is not None), default=None)
    floor = size.floor_bytes / ceiling
    return {
        **_names(size), "dense": dense, "dense_best": best, "step": queued, "step_graph": replayed,
        "speedup": None if best is None else best / replayed, "hash_bytes": size.hash_bytes,
        "kv_bytes": size.kv_bytes, "floor": floor, "over_floor": replayed / floor,
    }  # fmt: skip
