"""Brings what a request attended to from the workers to its output, where it asks for that.

vLLM carries ``kv_transfer_params`` from its scheduler to a request's output and on to responses.
With kvplug no connector fills it in, so counts travel there, under a name of their own. From the
workers to the scheduler they ride on the step's output, which is pickled whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from kvplug.patches.record import Patch
from kvplug.row_counts import FIELDS, RowCounts

KEY = "kvplug"
"""Of the counts among a request's ``kv_transfer_params``."""
COUNTS = "kvplug_counts"
"""Attribute of a step's output: ``{request: [4] FIELDS}``, of this step alone."""
TOTALS = "kvplug_totals"
"""Attribute of a scheduler's request, and of the parent of several: what it has come to."""
COUNTING = "kvplug_counting"
"""Attribute of a model runner while a step runs in which someone wants to know."""

PARAMS = 4
"""Place of ``kv_transfer_params`` among what an output is made of."""


class Counting:
    """The counts of a step that runs.

    Args:
        wanted: ``[B]`` whether a row's request wants to know.
        names: ``[B]`` the requests.
    """

    def __init__(self, wanted: list[bool], names: list[str]) -> None:
        """Starts without groups of layers."""
        self._rows = [row for row, is_wanted in enumerate(wanted) if is_wanted]
        self._names = names
        self._groups: list[RowCounts] = []

    def begin(self, runner: Any) -> None:
        """Waits on vLLM's model runner until the step ends."""
        setattr(runner, COUNTING, self)

    def of_group(self) -> RowCounts:
        """What takes the counts of one more group of layers."""
        self._groups.append(RowCounts(len(self._names)))
        return self._groups[-1]

    def by_request(self) -> dict[str, list[int]]:
        """``{request: [4] FIELDS}``; pages of groups add up, tokens and windows are the same."""
        tables = np.stack([group.table for group in self._groups])
        tokens = [field.startswith("sparse_") for field in FIELDS]
        found = np.where(tokens, tables.max(0), tables.sum(0))
        return {self._names[row]: found[row].tolist() for row in self._rows}


def _wrap_sample(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        counting = vars(self.model_runner).pop(COUNTING, None)
        # Only a step's own output: vLLM's empty one is shared by every step that has none.
        if counting is not None and getattr(output, "req_ids", None):
            setattr(output, COUNTS, counting.by_request())
        return output

    return sample_tokens


def _wrap_update(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        counts = getattr(model_runner_output, COUNTS, None)
        if counts is None:
            return original(self, scheduler_output, model_runner_output)
        totals = {
            name: _add(self.requests[name], scheduler_output.num_scheduled_tokens[name], mine)
            for name, mine in counts.items()
            if name in self.requests
        }
        found = original(self, scheduler_output, model_runner_output)
        for outputs in found.values():
            for output in outputs.outputs:
                if output.request_id in totals:
                    others = output.kv_transfer_params or {}
                    output.kv_transfer_params = {**others, KEY: totals[output.request_id]}
        return found

    return update_from_output


def _add(request: Any, tokens: int, counts: list[int]) -> dict[str, int]:
    """What a scheduler's request has come to after a step.

    Args:
        request: The request; a preempted one keeps what it came to.
        tokens: Of the step.
        counts: ``[4]`` of the step.
    """
    new = dict(zip(FIELDS, counts, strict=True))
    new = {"dense_tokens": tokens - new["sparse_tokens"], **new}
    before = vars(request).get(TOTALS, {})
    # A new object each time: a front end in the same process holds the last one.
    totals = {field: before.get(field, 0) + count for field, count in new.items()}
    setattr(request, TOTALS, totals)
    return totals


def _wrap_output(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Called for every output of every step, so a request for one choice costs a look.
        if self.parent_req is not None and len(args) > PARAMS:
            mine = args[PARAMS]
            if mine and KEY in mine:
                mine = _with_siblings(self, mine)
                args = (*args[:PARAMS], mine, *args[PARAMS + 1 :])
        return original(self, *args, **kwargs)

    return make_request_output


def _with_siblings(state: Any, params: dict[str, Any]) -> dict[str, Any]:
    """The same with the counts of all choices of a request for several.

    Args:
        state: vLLM's state of one choice.
        params: Its ``kv_transfer_params``.
    """
    choices = vars(state.parent_req).setdefault(TOTALS, {})
    choices[state.request_id] = params[KEY]
    return {**params, KEY: added(choices.values())}


def added(counts: Any) -> dict[str, int]:
    """The sum of several requests' counts, each with the same fields."""
    counts = list(counts)
    return {field: sum(each[field] for each in counts) for field in counts[0]}


_VLLM = ">=0.32,<0.33"
_UPSTREAM = "https://github.com/vllm-project/vllm/issues/57566"

PATCHES = [
    Patch(
        target="vllm.v1.worker.gpu_worker:Worker.sample_tokens",
        vllm=_VLLM,
        why="An attention backend cannot add to a step's output, and has counted everything only "
        "when the step ends.",
        upstream=_UPSTREAM,
        remove_when="ModelRunnerOutput has a field for what a backend says of each request.",
        fingerprint="461564027b612c60",
        wrap=_wrap_sample,
    ),
    Patch(
        target="vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
        vllm=_VLLM,
        why="The scheduler passes on what it knows of a step's output and drops the rest.",
        upstream=_UPSTREAM,
        remove_when="The same field reaches EngineCoreOutput.",
        fingerprint="85b29db96051135c",
        wrap=_wrap_update,
    ),
    Patch(
        target="vllm.v1.engine.output_processor:RequestState.make_request_output",
        vllm=_VLLM,
        why="Of a request for several choices, vLLM keeps the kv_transfer_params of the last one.",
        upstream=_UPSTREAM,
        remove_when="Outputs of several choices keep those of each.",
        fingerprint="353cb96c5deaa307",
        wrap=_wrap_output,
    ),
]
