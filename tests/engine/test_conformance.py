"""What clients of the OpenAI API expect of any server holds with kvplug in it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from kvplug.machine import engine_environment
from kvplug.models.documents import NeedlePrompt, needle_prompt
from kvplug.serve.server import running_server

pytestmark = pytest.mark.engine


class Api(NamedTuple):
    url: str
    client: openai.OpenAI
    prompt: NeedlePrompt


@pytest.fixture(scope="module")
def api(
    recall_model: str, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    command = [
        "-m", "kvplug", "serve", recall_model, "--budget", "256", "--dense-below", "512",
        "--max-model-len", "4096", "--served-model-name", "recall", "--dtype", "bfloat16",
        "--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("conformance") / "log"
    prompt = needle_prompt(tokenizer, 3000, depth=0.6, seed=21)
    with running_server(command, engine_environment(2, in_process=False), log) as server:
        yield Api(server.url, openai.OpenAI(base_url=server.url, api_key="x", timeout=120), prompt)


def ask(api: Api, **options: Any) -> Any:
    """A chat completion of the needle prompt."""
    fields = {"temperature": 0, "max_tokens": 12, **options}
    messages: Any = api.prompt.messages()
    return api.client.chat.completions.create(model="recall", messages=messages, **fields)


def test_streamed_as_whole(api: Api) -> None:
    chunks = list(ask(api, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = ask(api)
    assert text == whole.choices[0].message.content
    assert text.strip() == api.prompt.expected
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens == 3000
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


def test_many_clients_at_once(api: Api) -> None:
    """Asynchronous, half of them streamed, budgets mixed."""

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        extra = {"vllm_xargs": {"kvplug_budget": 256 + 32 * (number % 3)}}
        messages: Any = api.prompt.messages()
        if number % 2:
            reply = await client.chat.completions.create(
                model="recall", messages=messages, temperature=0, max_tokens=12, extra_body=extra
            )
            return str(reply.choices[0].message.content)
        stream = await client.chat.completions.create(
            model="recall", messages=messages, temperature=0, max_tokens=12, extra_body=extra,
            stream=True,
        )  # fmt: skip
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=api.url, api_key="x", timeout=120) as client:
            return await asyncio.gather(*(one(client, number) for number in range(24)))

    assert {text.strip() for text in asyncio.run(all_of_them())} == {api.prompt.expected}


def test_several_choices(api: Api) -> None:
    reply = ask(api, n=3, temperature=0.01)  # vLLM draws no two greedy choices
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content.strip() for choice in reply.choices} == {api.prompt.expected}


def test_logprobs(api: Api) -> None:
    reply = ask(api, logprobs=True, top_logprobs=3)
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == reply.usage.completion_tokens
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token, "greedy decoding takes the best"


def test_stop(api: Api) -> None:
    word = api.prompt.expected.split()[1]
    reply = ask(api, stop=[word])
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].message.content.strip() == api.prompt.expected.split()[0]


def test_too_few_tokens_is_a_length(api: Api) -> None:
    reply = ask(api, max_tokens=1)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 1


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_tools_that_the_model_does_not_call(api: Api, choice: str) -> None:
    """The bundled models' words have no braces, so no call could be forced out of them."""
    parameters = {"type": "object", "properties": {"color": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "paint", "parameters": parameters}}
    message = ask(api, tools=[tool], tool_choice=choice).choices[0].message
    assert message.content.strip() == api.prompt.expected
    assert not message.tool_calls


def test_completions_of_token_ids_and_echo(api: Api) -> None:
    reply = api.client.completions.create(
        model="recall", prompt=api.prompt.token_ids, temperature=0, max_tokens=12
    )
    assert reply.choices[0].text.strip() == api.prompt.expected
    many = api.client.completions.create(
        model="recall", prompt=[api.prompt.token_ids] * 3, temperature=0, max_tokens=12
    )
    assert [choice.text.strip() for choice in many.choices] == [api.prompt.expected] * 3


def test_unknown_model_is_not_found(api: Api) -> None:
    with pytest.raises(openai.NotFoundError):
        api.client.completions.create(model="nobody", prompt="x")


def operations(api: Api, pattern: str) -> list[Any]:
    """What the server's own schema has under a path."""
    schema = schemathesis.openapi.from_url(f"{api.url[:-3]}/openapi.json")
    found = schema.include(path_regex=pattern).get_all_operations()
    return [operation.ok() for operation in found]  # type: ignore[union-attr]


def test_kvplug_s_endpoints_obey_their_schema(api: Api) -> None:
    """Statuses, content types and bodies are declared, whatever is asked."""
    found = operations(api, "^/v1/kvplug/")
    assert {operation.path for operation in found} == {
        "/v1/kvplug/config", "/v1/kvplug/status", "/v1/kvplug/traces/{name}",
    }  # fmt: skip
    for operation in found:

        @given(case=operation.as_strategy())
        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
        def obeys(case: Any) -> None:
            case.call_and_validate()

        obeys()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_bodies_by_the_schema_are_no_server_errors(api: Api, path: str) -> None:
    [operation] = operations(api, f"^{path}$")

    @given(case=operation.as_strategy())
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def answers(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body |= {"max_tokens": 2, "n": 1, "stream": False}
        assert case.call().status_code < 500

    answers()


# ---------------------------------------------------------------- what usage says when asked

ASK: dict[str, Any] = {"extra_body": {"vllm_xargs": {"kvplug_usage": 1}}}
STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def usage_of(reply: Any) -> dict[str, int]:
    """What the openai client reads of the counts in a response's usage."""
    found: dict[str, int] = reply.usage.kvplug
    return found


def counted(api: Api) -> dict[str, int]:
    """What the worker counted so far."""
    [worker] = httpx.get(f"{api.url}/kvplug/status", timeout=30).json()["workers"]
    found: dict[str, int] = worker["selection"]
    return found


def test_usage_says_what_was_attended_to(api: Api, tokenizer: Any) -> None:
    """In every API, whole and streamed: what the worker counted, and of computed tokens only."""
    prompt = needle_prompt(tokenizer, 2100, depth=0.4, seed=22)
    mine = api._replace(prompt=prompt)
    before = counted(api)
    reply = ask(mine, **ASK)
    found, after = usage_of(reply), counted(api)
    assert found == {field: after[field] - before[field] for field in found}
    computed = reply.usage.prompt_tokens + reply.usage.completion_tokens - 1
    assert found["dense_tokens"] + found["sparse_tokens"] == computed
    assert 512 <= found["dense_tokens"] < 1200
    assert 0 < found["pages_attended"] < found["pages_available"]
    assert reply.choices[0].message.content.strip() == prompt.expected
    assert "kv_transfer_params" not in reply.model_dump(exclude_none=True)
    # From here on the prompt is cached: its whole windows are computed no more.
    cached = usage_of(ask(mine, **ASK))
    assert cached["dense_tokens"] == 0
    assert cached["sparse_tokens"] == computed - 2100 // 256 * 256
    text: dict[str, Any] = {
        "model": "recall",
        "prompt": prompt.token_ids,
        "temperature": 0,
        "max_tokens": 12,
    }
    assert usage_of(api.client.completions.create(**text, **ASK)) == cached
    for stream in (
        ask(mine, **STREAM, **ASK),
        api.client.completions.create(**text, **STREAM, **ASK),
    ):
        *_, last = stream
        assert usage_of(last) == cached
    assert "kvplug" not in ask(mine).usage.model_dump()


def test_usage_of_the_responses_api(api: Api) -> None:
    messages: Any = api.prompt.messages()
    fields = {"model": "recall", "input": messages, "temperature": 0, "max_output_tokens": 12}
    whole = api.client.responses.create(**fields, **ASK)
    found = usage_of(whole)
    total = whole.usage.total_tokens - 1 - whole.usage.input_tokens_details.cached_tokens
    assert found["dense_tokens"] + found["sparse_tokens"] == total
    *_, last = api.client.responses.create(**fields, **ASK, stream=True)
    assert 0 < usage_of(last.response)["pages_attended"] <= found["pages_attended"]


def test_usage_of_dense_requests(api: Api) -> None:
    extra = {"vllm_xargs": {"kvplug_usage": True, "kvplug_dense": 1}}
    dense = ask(api, extra_body=extra)
    assert usage_of(dense) == {
        "dense_tokens": 3000 + dense.usage.completion_tokens - 1, "sparse_tokens": 0,
        "sparse_windows": 0, "pages_attended": 0, "pages_available": 0,
    }  # fmt: skip


def test_usage_of_choices_prompts_and_clients(api: Api, tokenizer: Any) -> None:
    """Choices and prompts add up; requests of one batch are told their own."""
    prompts = [needle_prompt(tokenizer, 1400 + 250 * n, 0.5, 30 + n).token_ids for n in range(3)]

    def counts(prompt: Any, **options: Any) -> dict[str, int]:
        return usage_of(
            api.client.completions.create(
                model="recall",
                prompt=prompt,
                temperature=0.01,
                max_tokens=4,
                **options,
                extra_body={**ASK["extra_body"], "ignore_eos": True},
            )
        )

    for prompt in prompts:
        counts(prompt)  # now they are cached, and cost the same each time
    alone = [counts(prompt) for prompt in prompts]
    assert alone[0] != alone[1] != alone[2]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(counts, prompts * 2)) == alone * 2
    summed = {field: sum(each[field] for each in alone) for field in alone[0]}
    assert counts(prompts) == summed
    assert counts(prompts[0], n=3) == {field: 3 * count for field, count in alone[0].items()}
    *_, last = api.client.completions.create(
        model="recall", prompt=prompts, n=2, temperature=0.01, max_tokens=4, **STREAM,
        extra_body={**ASK["extra_body"], "ignore_eos": True},
    )  # fmt: skip
    assert usage_of(last) == {field: 2 * count for field, count in summed.items()}


def test_usage_of_a_request_that_a_stop_word_ends(api: Api) -> None:
    """The front end finds it, and the engine never says that such a request is finished."""
    reply = ask(api, stop=[api.prompt.expected.split()[1]], **ASK)
    assert reply.choices[0].finish_reason == "stop"
    assert usage_of(reply)["sparse_tokens"] > 0
