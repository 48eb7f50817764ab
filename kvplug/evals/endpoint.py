"""Answers of a server that is running: any OpenAI completions endpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAI

from kvplug.errors import KvplugError
from kvplug.evals.plan import Question, Settings, Setup
from kvplug.evals.prompts import Prompts, Reply
from kvplug.evals.tasks import TASKS


class Endpoint:
    """A server and the model that it serves.

    Prompts are measured with the server's own tokenizer, which vLLM offers at ``/tokenize``.

    Args:
        settings: Of the run; ``settings.model`` is the URL up to ``/v1``.
        timeout_s: Seconds that a reply may take.
        key: API key.

    Raises:
        KvplugError: The server cannot be reached, or serves no model.
    """

    def __init__(self, settings: Settings, timeout_s: float, key: str) -> None:
        """Asks which model it serves."""
        self.url = settings.model.rstrip("/").removesuffix("/v1")
        self.client = OpenAI(
            base_url=f"{self.url}/v1", api_key=key, timeout=timeout_s, max_retries=0
        )
        self._http = httpx.Client(
            timeout=timeout_s, headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        with _plainly(self.url):
            served = list(self.client.models.list())
        if not served:
            raise KvplugError(f"{self.url} serves no model.")
        self.model = served[0].id
        self.prompts = Prompts(settings, self.count)

    def count(self, text: str) -> int:
        """Tokens of a text.

        Raises:
            KvplugError: The server does not say.
        """
        asked = {"model": self.model, "prompt": text}
        with _plainly(self.url):
            reply = self._http.post(f"{self.url}/tokenize", json=asked)
            reply.raise_for_status()
            return int(reply.json()["count"])

    def check(self, setups: list[Setup]) -> None:
        """A server's setup is its own."""

    def replies(
        self, setups: list[Setup], asked: list[tuple[Setup, Question]]
    ) -> Iterator[tuple[Setup, Question, Reply]]:
        """Puts questions, one after the other.

        Raises:
            KvplugError: The server failed; what was answered before is kept.
        """
        for setup, question in asked:
            prompt = self.prompts.of(question).example.prompt
            with _plainly(self.url):
                reply = self._ask(prompt, TASKS.get(question.task).max_tokens)
            yield setup, question, reply

    def _ask(self, prompt: str, most: int) -> Reply:
        """Streams one completion."""
        start = time.perf_counter()
        stream = self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=most, temperature=0, stream=True
        )
        text, first, last, pieces = "", 0.0, 0.0, 0
        for chunk in stream:
            if chunk.choices and chunk.choices[0].text:
                last = time.perf_counter()
                first = first or last
                text += chunk.choices[0].text
                pieces += 1
        rate = (pieces - 1) / (last - first) if pieces > 1 and last > first else None
        return Reply(text, [], (first or time.perf_counter()) - start, rate)


@contextmanager
def _plainly(url: str) -> Iterator[None]:
    """Turns a client's exceptions into one sentence."""
    try:
        yield
    except (APITimeoutError, httpx.TimeoutException):
        raise KvplugError(f"{url} did not answer in time.") from None
    except APIStatusError as error:
        raise KvplugError(f"{url} answered {error.status_code}: {error.message}") from None
    except httpx.HTTPStatusError as error:
        raise KvplugError(f"{error.request.url} answered {error.response.status_code}.") from None
    except (APIConnectionError, httpx.TransportError):
        raise KvplugError(f"{url} cannot be reached.") from None
