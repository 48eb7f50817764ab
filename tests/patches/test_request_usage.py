"""Counts find their way from a worker's step to a request's output, and only where asked for."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kvplug.patches import request_knobs, request_usage
from kvplug.patches.request_usage import COUNTING, COUNTS, KEY, TOTALS, Counting
from kvplug.row_counts import RowCounts

NAMES = ["a", "b", "c"]


class Builder:
    """A planner of one group of layers."""

    def __init__(self) -> None:
        self.asked: Any = None
        self.counts: RowCounts | None = None
        self.pipeline = SimpleNamespace(
            geometry=SimpleNamespace(budget_pages=8), trace=None,
            budget_pages=lambda knobs: (knobs.budget or 256) // 32,
        )  # fmt: skip


def runner(extra: list[dict[str, Any] | None], builders: list[Builder]) -> Any:
    """vLLM's model runner with a batch of requests that ask for ``extra``."""
    groups = [SimpleNamespace(get_metadata_builder=lambda _, each=each: each) for each in builders]
    return SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=NAMES),
        requests={
            name: SimpleNamespace(sampling_params=SimpleNamespace(extra_args=each))
            for name, each in zip(NAMES, extra, strict=True)
        },
        attn_groups=[groups],
    )


def step(made: Any, output: Any) -> Any:
    """What the worker returns for a step of the runner."""
    worker = SimpleNamespace(model_runner=made)
    return request_usage._wrap_sample(lambda self, grammar: output)(worker, None)


def output() -> ModelRunnerOutput:
    return ModelRunnerOutput(NAMES, {name: n for n, name in enumerate(NAMES)})


@pytest.mark.parametrize(
    "extra", [[None, None, None], [{}, {"kvplug_budget": 64}, None], [{"kvplug_usage": 0}] * 3]
)
def test_nothing_is_counted_unless_asked_for(extra: list[dict[str, Any] | None]) -> None:
    builder = Builder()
    made = runner(extra, [builder])
    request_knobs.tell_wishes(made, 3)
    assert builder.counts is None
    assert not hasattr(made, COUNTING)
    assert not hasattr(step(made, output()), COUNTS)


def test_who_only_asks_for_counts_steers_nothing() -> None:
    builder = Builder()
    request_knobs.tell_wishes(runner([{"kvplug_usage": 1}, None, None], [builder]), 3)
    assert builder.asked is None
    assert builder.counts is not None


def test_a_step_names_those_who_asked() -> None:
    """Pages of two groups of layers add up; the tokens are the same ones."""
    builders = [Builder(), Builder()]
    made = runner(
        [{"kvplug_usage": 1}, None, {"kvplug_usage": True, "kvplug_budget": 64}], builders
    )
    request_knobs.tell_wishes(made, 3)
    for builder, pages in zip(builders, (10, 100), strict=True):
        assert builder.counts is not None
        builder.counts.table[:] = [[5, 2, pages, 10 * pages]] * 3
    assert builders[0].asked.budgets.tolist() == [8, 8, 2]
    found = step(made, output())
    assert getattr(found, COUNTS) == {"a": [5, 2, 110, 1100], "c": [5, 2, 110, 1100]}
    assert getattr(copy.deepcopy(found), COUNTS) == getattr(found, COUNTS)
    assert not hasattr(step(made, output()), COUNTS), "the next step is another one"


def test_an_output_that_steps_share_stays_as_it_is() -> None:
    made = runner([{"kvplug_usage": 1}, None, None], [Builder()])
    request_knobs.tell_wishes(made, 3)
    assert step(made, EMPTY_MODEL_RUNNER_OUTPUT) is EMPTY_MODEL_RUNNER_OUTPUT
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, COUNTS)


def update(requests: dict[str, Any], counts: Any, scheduled: dict[str, int]) -> Any:
    """A scheduler's outputs of one step, after a trip to the front end."""
    stepped = output()
    if counts is not None:
        setattr(stepped, COUNTS, counts)
    made = EngineCoreOutputs(outputs=[EngineCoreOutput(name, [7]) for name in scheduled])
    scheduler = SimpleNamespace(requests=requests)
    wrapped = request_usage._wrap_update(lambda *arguments: {0: made})
    found = wrapped(scheduler, SimpleNamespace(num_scheduled_tokens=scheduled), stepped)[0]
    decoded = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(found))
    return {each.request_id: each.kv_transfer_params for each in decoded.outputs}


def test_the_scheduler_adds_up_steps() -> None:
    requests = {"a": SimpleNamespace(), "b": SimpleNamespace()}
    first = update(requests, {"a": [100, 1, 30, 60]}, {"a": 256, "b": 3})
    assert first["b"] is None
    assert first["a"] == {
        KEY: {
            "dense_tokens": 156, "sparse_tokens": 100, "sparse_windows": 1, "pages_attended": 30,
            "pages_available": 60,
        }
    }  # fmt: skip
    second = update(requests, {"a": [1, 1, 5, 9]}, {"a": 1})["a"][KEY]
    assert second["dense_tokens"] == 156
    assert second["sparse_tokens"] == 101
    assert second["pages_available"] == 69
    assert not hasattr(requests["b"], TOTALS)


def test_a_request_that_left_is_forgotten() -> None:
    assert update({}, {"a": [1, 1, 5, 9]}, {"a": 1}) == {"a": None}


def test_steps_without_counts_pass() -> None:
    assert update({"a": SimpleNamespace()}, None, {"a": 1}) == {"a": None}


def state(name: str, parent: Any) -> Any:
    return SimpleNamespace(request_id=name, parent_req=parent)


def made_output(of: Any, params: Any) -> Any:
    """The ``kv_transfer_params`` that vLLM's output of a choice gets."""

    def original(self: Any, *arguments: Any, **rest: Any) -> Any:
        assert rest == {"ec_transfer_params": None}
        return arguments[4]

    wrapped = request_usage._wrap_output(original)
    return wrapped(of, [7], None, None, None, params, ec_transfer_params=None)


def test_choices_of_one_request_add_up() -> None:
    parent = SimpleNamespace()
    one, two = state("0_a", parent), state("1_a", parent)
    assert made_output(one, {KEY: {"x": 1}, "other": 3}) == {KEY: {"x": 1}, "other": 3}
    assert made_output(two, {KEY: {"x": 10}}) == {KEY: {"x": 11}}
    assert made_output(one, {KEY: {"x": 5}}) == {KEY: {"x": 15}}
    assert made_output(two, None) is None
    assert made_output(state("a", None), {KEY: {"x": 1}}) == {KEY: {"x": 1}}


def test_rows_are_told_apart() -> None:
    counting = Counting([True, False, True], NAMES)
    counting.of_group().table[:] = np.arange(12).reshape(3, 4)
    assert counting.by_request() == {"a": [0, 1, 2, 3], "c": [8, 9, 10, 11]}
