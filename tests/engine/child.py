"""One real vLLM engine in a process of its own: a JSON spec on stdin, a JSON result last on stdout.

A spec holds ``kvplug`` (options, or null for stock vLLM), ``engine`` (vLLM's engine arguments),
``rounds`` (lists of requests ``{"ids": [...], "max_tokens": n}``, optionally with a ``salt`` that
keeps a request from sharing a prefix; a round is served at once, the next begins when it is done),
and optionally ``sabotage``, the name of a patch target to undo. Run by itself it takes the backend
for CUDA, see ``pretended_cuda.py``; with ``graphs`` in the spec it captures graphs, and no windows
are noted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from tests.pretended_graph import PretendedGraph


class Recorder:
    """Notes what every window selected, by request content, so runs can be compared."""

    def __init__(self) -> None:
        self.selections: dict[str, list[list[int]]] = {}

    def install(self) -> None:
        """Wraps the pipeline's last step."""
        from kvplug.page_table import PageTable

        original = PageTable.write_selected

        def write_selected(table: Any, selected: Any, counts: Any, varies: bool) -> None:
            self.note(table.step, selected, counts)
            original(table, selected, counts, varies)

        PageTable.write_selected = write_selected  # type: ignore[assignment, method-assign]

    def note(self, step: Any, selected: Any, counts: Any) -> None:
        """Files one layer's selections under the window's end and size, in order of occurrence."""
        windows = step.windows
        for w, s in enumerate(step.sparse_windows):
            name = f"{windows.context_end[s]}/{windows.num_tokens[s]}"
            rows = [
                selected[w, head, : counts[w, head]].tolist() for head in range(counts.shape[1])
            ]
            self.selections.setdefault(name, []).append(rows)


class DeviceRecorder:
    """The same of the backend for CUDA, whose rows are of physical pages, sinks and local ones too.

    Far pages are filed, in ascending order.
    """

    def __init__(self) -> None:
        self.selections: dict[str, list[list[list[int]]]] = {}

    def install(self) -> None:
        """Wraps a layer's selection."""
        from kvplug.attention.device.pipeline import DeviceLayer

        original = DeviceLayer.select

        def select(layer: Any, queries: Any, plan: Any, windows: Any) -> Any:
            rows = original(layer, queries, plan, windows)
            self.note(layer, rows, plan, windows)
            return rows

        DeviceLayer.select = select  # type: ignore[assignment, method-assign]

    def note(self, layer: Any, rows: Any, plan: Any, windows: Any) -> None:
        """Files one layer's selections under the window's end and size."""
        heads, page = layer.shape.num_kv_heads, layer.shape.page
        for s in range(len(windows)):
            end, tokens = int(windows.context_end[s]), int(windows.num_tokens[s])
            far = range(int(windows.far_begin[s]), int(windows.far_end[s]))
            table = plan.block_table[int(windows.request[s])].tolist()
            logical = {table[n]: n for n in far}
            found = []
            for row in range(s * heads, (s + 1) * heads):
                mine = rows.table[row, : -(-int(rows.lengths[row]) // page)].tolist()
                found.append(sorted(logical[n] for n in mine if n in logical))
            self.selections.setdefault(f"{end}/{tokens}", []).append(found)


def main(recorder: Recorder | DeviceRecorder | None = None) -> None:
    """Runs the spec."""
    spec = json.loads(sys.stdin.read())
    recorder = recorder or Recorder()
    if spec.get("graphs"):
        from tests.engine.pretended_cuda import capture, with_graphs

        with_graphs()
    if spec.get("sabotage"):
        from kvplug.patches import apply

        kept = [patch for patch in apply.all_patches() if patch.target != spec["sabotage"]]
        apply.all_patches = lambda device=None: kept
    from vllm import LLM, SamplingParams

    engine = dict(spec["engine"])
    if spec["kvplug"] is not None:
        engine["attention_backend"] = "CUSTOM"
        engine["additional_config"] = {"kvplug": spec["kvplug"]}
    llm = LLM(**{"dtype": "bfloat16", "enforce_eager": True, **engine})
    captured = capture(llm) if spec.get("graphs") else []
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted: list[str] = []
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    if spec["kvplug"] is not None and not captured:
        recorder.install()
    rounds = []
    for requests in spec["rounds"]:
        outputs = llm.generate(
            [
                {"prompt_token_ids": request["ids"], "cache_salt": request.get("salt")}
                for request in requests
            ],
            [
                SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
                for request in requests
            ],
            use_tqdm=False,
        )
        rounds.append(
            [
                {"tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens}
                for o in outputs
            ]
        )
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    pools = [hot for layer in context.values() if (hot := getattr(layer.impl, "hot", None))]
    backend = {type(layer.impl).__name__ for layer in context.values()}
    coarse = [getattr(layer.impl, "coarse", None) is not None for layer in context.values()]
    print(
        json.dumps(
            {
                "rounds": rounds,
                "preempted": len(preempted),
                "selections": recorder.selections,
                "impls": sorted(backend),
                "coarse": all(coarse),
                "captured": captured,
                "replays": PretendedGraph.replays,
                "pools": [asdict(pool.counts) for pool in pools if pool.check_integrity()],
            }
        )
    )


if __name__ == "__main__":
    from tests.engine.pretended_cuda import pretend

    pretend()
    main(DeviceRecorder())
