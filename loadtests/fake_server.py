"""An OpenAI server with known delays, by which a client is calibrated and tested.

``python -m kvplug.loadtests.fake_server --host 127.0.0.1 --port P``. It looks the answer up in the
prompt ("What is X?" and "X is Y."), says it word by word, and waits as it was told: a first token
after ``ttft_s``, another every ``gap_s``, all counted from the request's last byte, so that
lateness does not add up. A body's ``fake`` field changes both, and makes it fail as servers do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import time
from dataclasses import dataclass, field
from typing import Any

from kvplug.errors import KvplugError, nearest_name

FAULTS = (
    "", "bad event", "cut", "empty", "error event", "html", "http 500", "http 503", "no done",
    "not json", "role only", "split",
)  # fmt: skip
"""How an answer can go wrong; ``split`` is right, but sent three bytes at a time."""
SENT_BEFORE_CUT = 2
"""Tokens that come before a stream is cut off."""
QUESTION = re.compile(r"what is ([^?]+)\?", re.IGNORECASE)
MODEL = "fake"


@dataclass
class Fake:
    """What the server does, and what it has seen."""

    ttft_s: float = 0.05
    gap_s: float = 0.02
    slots: int = 0
    """Requests served at once, the others wait; 0: any number."""
    stall_at_s: float = 0.0
    """When it stands still, in seconds since the first request."""
    stall_s: float = 0.0
    """For how long; 0: never."""
    die_after: int = 0
    """Requests after which the process ends without a word; 0: it does not."""
    answered: int = 0
    running: int = 0
    lates: list[float] = field(default_factory=list)
    """Seconds that each token went out behind its time: the fake server's own error."""
    room: asyncio.Semaphore | None = None
    begun: float = 0.0


def answer(messages: list[dict[str, str]]) -> str:
    """The sentence that answers the last message's question."""
    asked = QUESTION.findall(messages[-1]["content"])
    if not asked:
        return "there was no question."
    key = asked[-1].strip()
    text = " ".join(message["content"] for message in messages)
    found = re.search(re.escape(key) + r" is ([^.]+\.)", text, re.IGNORECASE)
    return found.group(1) if found else "nobody knows."


def event(data: str) -> bytes:
    """Bytes of a server-sent event."""
    return f"data: {data}\n\n".encode()


def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    """One piece of a chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event(json.dumps({"object": "chat.completion.chunk", "choices": [choice]}))


async def serve_chat(fake: Fake, body: dict[str, Any], out: asyncio.StreamWriter) -> None:
    """Streams one completion."""
    begun = asyncio.get_running_loop().time()
    told = body.get("fake") or {}
    fault = told.get("fault", "")
    if fault not in FAULTS:
        raise KvplugError(f"Unknown fault {fault!r}: {nearest_name(fault, FAULTS)}.")
    if fault.startswith("http"):
        send_whole(out, json.dumps({"error": {"message": "made to fail"}}), status=fault[5:])
        return
    if fault == "html":
        send_whole(out, "<html>a proxy's page</html>", kind="text/html")
        return
    out.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
    out.write(chunk({"role": "assistant", "content": ""}))
    pieces = answer(body["messages"]).split()
    if body.get("ignore_eos"):
        pieces = (pieces * body["max_tokens"])[: body["max_tokens"]]
    if fault in ("empty", "role only"):
        pieces = []
    await say(fake, begun, told, pieces, fault, out)
    if fault == "cut" or fault == "not json" or fault == "error event":
        return
    out.write(chunk({}, "stop"))
    prompt = sum(len(message["content"].split()) for message in body["messages"])
    usage = {"prompt_tokens": prompt, "completion_tokens": len(pieces)}
    if (body.get("stream_options") or {}).get("include_usage"):
        out.write(event(json.dumps({"choices": [], "usage": usage})))
    if fault != "no done":
        out.write(event("[DONE]"))


async def say(
    fake: Fake, begun: float, told: dict[str, Any], pieces: list[str], fault: str,
    out: asyncio.StreamWriter,
) -> None:  # fmt: skip
    """Sends pieces at their times, which count from ``begun``."""
    loop = asyncio.get_running_loop()
    first, gap = told.get("ttft_s", fake.ttft_s), told.get("gap_s", fake.gap_s)
    for place, piece in enumerate(pieces):
        due = begun + first + place * gap
        await asyncio.sleep(due - loop.time())
        if place == SENT_BEFORE_CUT and fault in ("cut", "not json", "error event"):
            spoiled = {"not json": "{", "error event": json.dumps({"error": {"message": "broke"}})}
            out.write(event(spoiled[fault]) if fault in spoiled else b"data: {")
            return
        data = chunk({"content": piece if place == 0 else f" {piece}"})
        for start in range(0, len(data), 3 if fault == "split" else len(data)):
            out.write(data[start : start + (3 if fault == "split" else len(data))])
            if fault == "split":
                await out.drain()
                await asyncio.sleep(0)
        fake.lates.append(loop.time() - due)


def send_whole(
    out: asyncio.StreamWriter, text: str, kind: str = "application/json", status: str = "200"
) -> None:
    """A response that is no stream."""
    data = text.encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
    out.write(head.encode() + b"Connection: close\r\n\r\n" + data)


def metrics(fake: Fake) -> str:
    """Text for Prometheus, under the names of vLLM that the load test reads."""
    ordered = sorted(fake.lates) or [0.0]
    lines = {
        'vllm:num_requests_running{model_name="fake"}': fake.running,
        'vllm:kv_cache_usage_perc{model_name="fake"}': min(1.0, fake.running / 100),
        "kvplug:fake_late_p50_seconds": ordered[len(ordered) // 2],
        "kvplug:fake_late_max_seconds": ordered[-1],
    }
    return "# TYPE x gauge\n" + "".join(f"{name} {value}\n" for name, value in lines.items())


async def handle(fake: Fake, source: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
    """One connection with one request."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        head = (await source.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ", 2)[1]
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        body = await source.readexactly(int(length.group(1)) if length else 0)
        if path == "/v1/chat/completions":
            await answer_in_turn(fake, json.loads(body), out)
        elif path == "/metrics":
            send_whole(out, metrics(fake), "text/plain")
        elif path == "/v1/models":
            send_whole(out, json.dumps({"data": [{"id": MODEL}]}))
        else:
            send_whole(out, "{}", status="200" if path == "/health" else "404")
        await out.drain()
    out.close()


async def answer_in_turn(fake: Fake, body: dict[str, Any], out: asyncio.StreamWriter) -> None:
    """Answers once there is room, or stands still or dies first if it was told to."""
    fake.begun = fake.begun or time.monotonic()
    fake.running += 1
    async with fake.room or contextlib.nullcontext():
        with contextlib.suppress(ConnectionError):
            await serve_chat(fake, body, out)
    fake.running -= 1
    fake.answered += 1
    if fake.answered == fake.die_after:
        os._exit(3)


async def stall(fake: Fake) -> None:
    """Stands still once: everything waits, and new connections are not even accepted."""
    while not fake.begun:
        await asyncio.sleep(0.001)
    await asyncio.sleep(fake.begun + fake.stall_at_s - time.monotonic())
    time.sleep(fake.stall_s)


async def serve(fake: Fake, host: str, port: int) -> None:
    """Serves for ever."""
    fake.room = asyncio.Semaphore(fake.slots) if fake.slots else None
    server = await asyncio.start_server(
        lambda source, out: handle(fake, source, out), host, port, backlog=1024
    )
    standing = asyncio.create_task(stall(fake)) if fake.stall_s else None
    async with server:
        await server.serve_forever()
    del standing


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="fake_server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    names = ("ttft_s", "gap_s", "slots", "stall_at_s", "stall_s", "die_after")
    for name in names:
        default = getattr(Fake(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = parser.parse_args()
    fake = Fake(**{name: getattr(given, name) for name in names})
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(fake, given.host, given.port))


if __name__ == "__main__":
    main()
