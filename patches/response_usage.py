"""Puts what a request attended to into the ``usage`` of its response, where it asks for that."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from kvplug.knobs import PREFIX
from kvplug.patches.record import Patch
from kvplug.patches.request_usage import KEY, added

OPTION = f"{PREFIX}usage"
EVENT, END = "data: ", "\n\n"
"""Around what a stream sends."""


class Tap:
    """Takes counts out of a response's outputs; several prompts add up."""

    def __init__(self) -> None:
        """Starts without counts."""
        self._by_prompt: dict[int, dict[str, int]] = {}

    def take(self, output: Any, prompt: int = 0) -> None:
        """Takes an output's counts, which are of everything up to it, out of it.

        Args:
            output: vLLM's ``RequestOutput``, or what else has its ``kv_transfer_params``.
            prompt: Number of its prompt.
        """
        params = dict(output.kv_transfer_params or {})
        if KEY in params:
            self._by_prompt[prompt] = params.pop(KEY)
            output.kv_transfer_params = params or None

    async def watch(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The same outputs, without counts; those of several prompts come with its number."""
        async for each in outputs:
            if isinstance(each, tuple):
                self.take(each[1], each[0])
            else:
                self.take(each)
            yield each

    def tell(self, response: Any) -> None:
        """Adds the counts to a whole response; to an error, or without counts, nothing."""
        usage = getattr(response, "usage", None)
        if self._by_prompt and usage is not None:
            setattr(usage, KEY, added(self._by_prompt.values()))

    async def retell(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """The same stream with the counts in its last usage."""
        async for event in events:
            yield self._retold(event)

    def _retold(self, event: str) -> str:
        """An event with the counts in it, where it is the one that ends with usage."""
        # No text that was generated holds unescaped quotes.
        if not self._by_prompt or '"choices":[]' not in event or '"usage":{' not in event:
            return event
        body = json.loads(event.removeprefix(EVENT))
        body["usage"][KEY] = added(self._by_prompt.values())
        return EVENT + json.dumps(body, ensure_ascii=False, separators=(",", ":")) + END


def _asks(request: Any) -> bool:
    """Whether a request of the API mentions the option; its value is checked elsewhere."""
    return bool(request.vllm_xargs) and OPTION in request.vllm_xargs


def _wrap_full(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def chat_completion_full_generator(
        self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _asks(request):
            return await original(self, request, result_generator, *args, **kwargs)
        tap = Tap()
        response = await original(self, request, tap.watch(result_generator), *args, **kwargs)
        tap.tell(response)
        return response

    return chat_completion_full_generator


def _wrap_chat_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def chat_completion_stream_generator(
        self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _asks(request):
            return original(self, request, result_generator, *args, **kwargs)
        tap = Tap()
        return tap.retell(original(self, request, tap.watch(result_generator), *args, **kwargs))

    return chat_completion_stream_generator


def _wrap_completion(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def request_output_to_completion_response(
        self: Any, final_res_batch: list[Any], request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        tap = Tap()
        for prompt, output in enumerate(final_res_batch if _asks(request) else ()):
            tap.take(output, prompt)
        response = original(self, final_res_batch, request, *args, **kwargs)
        tap.tell(response)
        return response

    return request_output_to_completion_response


def _wrap_completion_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def completion_stream_generator(
        self: Any, request: Any, engine_inputs: Any, result_generator: Any, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        if not _asks(request):
            return original(self, request, engine_inputs, result_generator, *args, **kwargs)
        tap = Tap()
        outputs = tap.watch(result_generator)
        return tap.retell(original(self, request, engine_inputs, outputs, *args, **kwargs))

    return completion_stream_generator


def _wrap_responses(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def responses_full_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        response = await original(self, request, *args, **kwargs)
        # vLLM copies an output's kv_transfer_params into the response; the end of a stream is
        # made here too.
        if _asks(request) and hasattr(response, "kv_transfer_params"):
            tap = Tap()
            tap.take(response)
            tap.tell(response)
        return response

    return responses_full_generator


_VLLM = ">=0.32,<0.33"
_WHY = "What usage says is written down where a response is made, and a plugin cannot add to it."
_UPSTREAM = "https://github.com/vllm-project/vllm/issues/57566"
_REMOVE_WHEN = "A request's output can carry fields into usage."
_OPENAI = "vllm.entrypoints.openai"


def _patch(target: str, fingerprint: str, wrap: Callable[..., Any]) -> Patch:
    """One of the records, which differ in these only."""
    return Patch(f"{_OPENAI}.{target}", _VLLM, _WHY, _UPSTREAM, _REMOVE_WHEN, fingerprint, wrap)


PATCHES = [
    _patch(
        "chat_completion.serving:OpenAIServingChat.chat_completion_full_generator",
        "5d228783d4f0a9ec",
        _wrap_full,
    ),
    _patch(
        "chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator",
        "413759ad163362db",
        _wrap_chat_stream,
    ),
    _patch(
        "completion.serving:OpenAIServingCompletion.request_output_to_completion_response",
        "5ad37b7a93ed9144",
        _wrap_completion,
    ),
    _patch(
        "completion.serving:OpenAIServingCompletion.completion_stream_generator",
        "3f590ecb8478e275",
        _wrap_completion_stream,
    ),
    _patch(
        "responses.serving:OpenAIServingResponses.responses_full_generator",
        "892e612ab2408895",
        _wrap_responses,
    ),
]
