"""Counts stand in the usage of a response, whole or streamed, and nothing else changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from openai.types import CompletionUsage
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from kvplug.patches import response_usage
from kvplug.patches.request_usage import KEY

ASKING = SimpleNamespace(vllm_xargs={"kvplug_usage": 1})
OTHERS = [SimpleNamespace(vllm_xargs=None), SimpleNamespace(vllm_xargs={"kvplug_budget": 64})]
USAGE = 'data: {"id":"x","choices":[],"usage":{"prompt_tokens":3}}\n\n'
TRICKY = 'data: {"choices":[{"text":"\\"choices\\":[] \\"usage\\":{ é"}],"usage":{"n":1}}\n\n'


def result(count: int | None, **others: Any) -> Any:
    """vLLM's output of a request."""
    params = dict(others)
    if count is not None:
        params[KEY] = {"pages_attended": count}
    return SimpleNamespace(kv_transfer_params=params or None)


async def each(items: Any) -> AsyncIterator[Any]:
    for item in items:
        yield item


def response(**fields: Any) -> Any:
    usage = UsageInfo(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    return SimpleNamespace(usage=usage, **fields)


def told(found: Any) -> Any:
    """What the openai client reads of a response's usage."""
    usage = CompletionUsage.model_validate(json.loads(found.usage.model_dump_json()))
    assert usage.total_tokens == 5
    return getattr(usage, KEY, None)


def chat(request: Any, results: list[Any]) -> Any:
    async def original(self: Any, request: Any, results: Any, *rest: Any) -> Any:
        assert rest == ("id",)
        last = [each async for each in results][-1]
        return response(kv_transfer_params=last.kv_transfer_params)

    return asyncio.run(response_usage._wrap_full(original)(None, request, each(results), "id"))


def test_a_whole_chat_completion() -> None:
    """The last output has the sum; whatever else it carries stays."""
    found = chat(ASKING, [result(4), result(9, remote=1)])
    assert told(found) == {"pages_attended": 9}
    assert found.kv_transfer_params == {"remote": 1}


@pytest.mark.parametrize("request_", OTHERS)
def test_who_does_not_ask_gets_vllm_s_own(request_: Any) -> None:
    assert told(chat(request_, [result(None)])) is None


def test_an_engine_without_counts_changes_nothing() -> None:
    """One that does not select kvplug, for instance."""
    assert told(chat(ASKING, [result(None), result(None)])) is None
    assert "kvplug" not in chat(ASKING, [result(None)]).usage.model_dump()


def test_an_error_passes() -> None:
    async def original(self: Any, request: Any, results: Any) -> Any:
        return SimpleNamespace(error="no") if [r async for r in results] else None

    wrapped = response_usage._wrap_full(original)
    assert asyncio.run(wrapped(None, ASKING, each([result(1)]))).error == "no"


def stream(wrap: Any, request: Any, results: list[Any], events: list[str], *between: Any) -> Any:
    """What a stream sends; its events come once its results are read."""

    async def original(self: Any, request: Any, *rest: Any) -> AsyncIterator[str]:
        assert rest[:-2] == between
        assert rest[-1] == "id"
        async for each in rest[-2]:
            assert (each[1] if isinstance(each, tuple) else each).kv_transfer_params is None
        for event in events:
            yield event

    async def read() -> list[str]:
        arguments = (None, request, *between, each(results), "id")
        return [event async for event in wrap(original)(*arguments)]

    return asyncio.run(read())


def test_a_streamed_chat_completion() -> None:
    events = [TRICKY, USAGE, "data: [DONE]\n\n"]
    found = stream(response_usage._wrap_chat_stream, ASKING, [result(4), result(9)], events)
    assert found[0] == TRICKY
    assert found[1].endswith("}\n\n")
    body = json.loads(found[1].removeprefix("data: "))
    assert body["usage"] == {"prompt_tokens": 3, KEY: {"pages_attended": 9}}
    assert body["id"] == "x"
    assert found[2] == events[2]


def test_a_streamed_completion_of_several_prompts() -> None:
    results = [(0, result(4)), (1, result(20)), (0, result(5)), (1, result(30))]
    events = [USAGE]
    wrap = response_usage._wrap_completion_stream
    [found] = stream(wrap, ASKING, results, events, ["prompts"])
    assert json.loads(found[6:])["usage"][KEY] == {"pages_attended": 35}


@pytest.mark.parametrize("request_", OTHERS)
def test_streams_of_who_does_not_ask(request_: Any) -> None:
    events = [TRICKY, USAGE]
    chats, completions = response_usage._wrap_chat_stream, response_usage._wrap_completion_stream
    assert stream(chats, request_, [result(None)], events) == events
    assert stream(completions, request_, [result(None)], events, ["prompts"]) == events


def test_a_whole_completion_of_several_prompts() -> None:
    def original(self: Any, batch: Any, request: Any, *rest: Any) -> Any:
        assert rest == ("id",)
        assert batch[0].kv_transfer_params is None
        return response()

    wrapped = response_usage._wrap_completion(original)
    assert told(wrapped(None, [result(4), result(6)], ASKING, "id")) == {"pages_attended": 10}
    assert told(wrapped(None, [result(None)], OTHERS[0], "id")) is None


def test_the_responses_api() -> None:
    async def original(self: Any, request: Any, *rest: Any) -> Any:
        return response(kv_transfer_params=result(7).kv_transfer_params)

    found = asyncio.run(response_usage._wrap_responses(original)(None, ASKING, "x"))
    assert told(found) == {"pages_attended": 7}
    assert found.kv_transfer_params is None
