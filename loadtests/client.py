"""A streaming chat client whose clock is read when bytes arrive.

Stock clients of load tools stop the clock at the headers, or read in blocks that hold many tokens.
This one takes the time of every piece that the socket gives, before anything is parsed. It works
under gevent, in threads, or alone.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from kvplug.loadtests.sse import EventParser

CONNECT_S = 10.0
KEEP_IDLE_S = 2.0
"""An idle connection is kept for less time than servers keep it (5 s), or both race."""
DETAIL = 300
"""Characters kept of what a server said was wrong."""
KEY = "KVPLUG_LOAD_KEY"
"""Environment variable by which client processes learn the API key, which stands in no file."""
clock = time.monotonic
"""Seconds; on Linux the same in all processes of a machine."""


@dataclass
class Reply:
    """What came back, and when; filled while it comes, so that nothing is lost on the way."""

    sent: float = 0.0
    """Clock before the request went out."""
    end: float = 0.0
    """Clock at the last byte, or at the failure."""
    stamps: list[float] = field(default_factory=list)
    """Clock at every event that held text; role-only and usage events do not."""
    parts: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None
    is_done: bool = False
    """The stream said that it is complete."""
    error: str | None = None
    """Kind of failure; the same failure has the same words."""
    detail: str = ""

    def fail(self, error: str, detail: object = "") -> None:
        """Marks a failure; the first one counts."""
        if self.error is None:
            self.error, self.detail = error, str(detail)[:DETAIL]


class StreamClient:
    """One process's connections to a server.

    Args:
        url: Base URL up to ``/v1``.
        key: API key; empty for none.
        timeout_s: Seconds for a whole request.
    """

    def __init__(self, url: str, key: str, timeout_s: float) -> None:
        """Opens nothing yet."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s)),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_IDLE_S),
            verify=url.startswith("https"),  # reading certificates takes as long as 100 requests
            trust_env=False,  # a proxy of the environment would be measured, and see the traffic
        )

    def warm_up(self) -> None:
        """Asks for nothing: what a first request loads and sets up is then there."""
        with contextlib.suppress(httpx.TransportError):
            self._http.get(self._url.replace("/chat/completions", "/models"), timeout=CONNECT_S)

    def ask(self, body: bytes, reply: Reply) -> None:
        """Sends one request and reads its stream to the end.

        Args:
            body: JSON of a streamed chat completion.
            reply: Filled in as the answer comes; failures are kept there, never raised.
        """
        request = self._http.build_request("POST", self._url, content=body)
        reply.sent = clock()
        try:
            response = self._http.send(request, stream=True)
            try:
                self._read(response, reply)
            finally:
                response.close()
        except httpx.ConnectError as error:
            reply.fail("refused", error)
        except httpx.TimeoutException as error:
            reply.fail("timeout", type(error).__name__)
        except httpx.TransportError as error:
            reply.fail("cut off", f"{type(error).__name__}: {error}")
        except ValueError as error:
            reply.fail("bad event", error)
        finally:
            reply.end = clock()

    def _read(self, response: httpx.Response, reply: Reply) -> None:
        """Reads a response into a reply."""
        kind = response.headers.get("content-type", "")
        if response.status_code != 200:
            reply.fail(f"http {response.status_code}", response.read().decode(errors="replace"))
            return
        if not kind.startswith("text/event-stream"):
            reply.fail("not a stream", f"{kind}: {response.read().decode(errors='replace')}")
            return
        parser, deadline = EventParser(), reply.sent + self._timeout_s
        for piece in response.iter_bytes():
            now = clock()
            for data in parser.feed(piece):
                take_event(data, now, reply)
            if now > deadline:
                reply.fail("timeout", "the whole request")
                return
        if not reply.is_done:
            reply.fail("cut off", "the stream ended without [DONE]")
        elif not reply.stamps:
            reply.fail("empty", "no text came")


def take_event(data: bytes, now: float, reply: Reply) -> None:
    """One event of a stream.

    Raises:
        ValueError: It is not a JSON object.
    """
    if data == b"[DONE]":
        reply.is_done = True
        return
    chunk = json.loads(data)
    if not isinstance(chunk, dict):
        raise ValueError(f"an event that is not an object: {data[:80]!r}")
    if chunk.get("error"):
        reply.fail("error event", json.dumps(chunk["error"]))
    if chunk.get("usage"):
        reply.usage = chunk["usage"]
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        text = delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content")
        if text:
            reply.stamps.append(now)
            reply.parts.append(text)
        reply.finish = choice.get("finish_reason") or reply.finish
