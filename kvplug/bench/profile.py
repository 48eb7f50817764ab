"""Where a recipe's time goes: ``python -m kvplug.bench.profile``, a job on standard input.

Two passes over one prompt and its decoding: in the first the pipeline as a whole and attention are
timed, in the second every stage by itself, whose own clock then costs time. Both are printed as one
line that starts with ``CELL``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kvplug.bench.engine import Bench
from kvplug.bench.job import Job
from kvplug.errors import KvplugError


class Clocks:
    """Seconds by label, of functions that are wrapped while a context lasts."""

    def __init__(self) -> None:
        """Starts at zero."""
        self.seconds: dict[str, float] = {}

    def clear(self) -> None:
        """Back to zero."""
        self.seconds.clear()

    @contextmanager
    def on(self, owner: type, name: str, label: str) -> Iterator[None]:
        """Adds the time of every call of ``owner.name`` to ``label``."""
        original = getattr(owner, name)
        own = name in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                passed = time.perf_counter() - start
                self.seconds[label] = self.seconds.get(label, 0.0) + passed

        setattr(owner, name, timed)
        try:
            yield
        finally:
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


def targets(layers: list[Any]) -> dict[str, list[tuple[type, str, str]]]:
    """What each pass times: (class, method, label), every class once.

    Args:
        layers: vLLM's attention layers that retrieve.

    Raises:
        KvplugError: They run on a GPU, whose clocks these are not.
    """
    from vllm.platforms import current_platform

    from kvplug.attention.attend.cpu import CpuAttend
    from kvplug.page_table import PageTable
    from kvplug.pipeline import Pipeline

    if not current_platform.is_cpu():
        raise KvplugError(
            "Stages are timed on CPUs only: on a GPU kvplug bench kernels times every kernel."
        )
    whole = [(Pipeline, name, "select") for name in ("plan", "run")]
    attention = [(CpuAttend, "__call__", "attend")]
    single: dict[tuple[type, str], str] = {(PageTable, "write_selected"): "table"}
    for layer in layers:
        stages = layer.impl.stages
        if stages is None:
            continue
        for memory in stages.beginners:
            single[type(memory), "begin"] = f"begin {type(memory).__name__}"
        for memory in stages.sealers:
            single[type(memory), "seal"] = f"seal {type(memory).__name__}"
        for memory in stages.watchers:
            single[type(memory), "watch"] = f"watch {type(memory).__name__}"
        single[type(stages.probe), "build"] = "probe"
        single[type(stages.index), "score"] = "score"
        single[type(stages.select), "select"] = "choose"
        if stages.budget.varies:
            single[type(stages.budget), "count"] = "budget"
    parts = [(owner, name, label) for (owner, name), label in single.items()]
    return {"whole": [*whole, *attention], "parts": parts}


def profile(job: Job) -> dict[str, Any]:
    """Times the job's first context.

    Returns:
        ``policy``, ``context_tokens``, and for ``prefill`` (seconds of the prompt) and ``decode``
        (seconds of a step): ``total``, ``select``, ``attend``, ``share`` (select / attend) and
        ``stages``.
    """
    bench = Bench(job)
    passes = targets(bench.retrieving_layers())
    context = job.contexts[0]
    prompt = bench.prompt(context, 0)[0]
    bench.run([prompt], 4, "warm")
    found: dict[str, Any] = {"policy": job.policy, "context_tokens": context}
    for name, timed in passes.items():
        clocks = Clocks()
        with ExitStack() as stack:
            for owner, method, label in timed:
                stack.enter_context(clocks.on(owner, method, label))
            found[name] = serve(bench, prompt, name, clocks)
    whole, parts = found.pop("whole"), found.pop("parts")
    for phase in ("prefill", "decode"):
        total, seconds = whole[phase]
        select, attend = seconds.get("select", 0.0), seconds.get("attend", 0.0)
        share = select / attend if attend else None
        found[phase] = {
            "total": total, "select": select, "attend": attend, "share": share,
            "stages": parts[phase][1],
        }  # fmt: skip
    return found


def serve(
    bench: Bench, prompt: list[int], salt: str, clocks: Clocks
) -> dict[str, tuple[float, dict[str, float]]]:
    """Serves one prompt.

    Returns:
        ``prefill`` -> seconds up to the first token and what the clocks say; ``decode`` -> the
        same per step after it.
    """
    from vllm import SamplingParams

    steps = bench.job.decoded
    sampling = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    request = {"prompt_token_ids": prompt, "cache_salt": salt}
    bench.engine.add_request(salt, request, sampling)
    start = time.perf_counter()
    while not bench.engine.step():
        pass
    first = time.perf_counter()
    prefill = first - start, dict(clocks.seconds)
    clocks.clear()
    while bench.engine.has_unfinished_requests():
        bench.engine.step()
    total = (time.perf_counter() - first) / steps
    per_step = {label: seconds / steps for label, seconds in clocks.seconds.items()}
    return {"prefill": prefill, "decode": (total, per_step)}


def main() -> None:
    """Profiles the job on standard input."""
    print("CELL", json.dumps(profile(Job.from_json(sys.stdin.read()))), flush=True)


if __name__ == "__main__":
    main()
