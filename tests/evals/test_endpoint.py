"""A server that answers, fails part way, is slow or is not there; on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvplug.errors import KvplugError
from kvplug.evals.endpoint import Endpoint
from kvplug.evals.plan import Job, Settings, Setup
from kvplug.evals.records import Records, read
from kvplug.evals.run import run

SETUPS = [Setup("mine", "mine")]


class Server(ThreadingHTTPServer):
    """Says "4 5 6" to everything, token by token.

    Attributes:
        fail_after: Completions before it fails.
        status: How it fails; 0: by not answering.
        asked: Prompts.
    """

    fail_after = 10**9
    status = 500
    asked: list[dict[str, Any]]
    models: list[dict[str, Any]]
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    """Of :class:`Server`."""

    server: Server

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": self.server.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.reply({"count": len(body["prompt"].split())})
            return
        if len(self.server.asked) >= self.server.fail_after:
            if self.server.status:
                self.reply({"error": {"message": "it broke"}}, self.server.status)
            else:
                time.sleep(8)
            return
        self.server.asked.append(body)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for text in ("4", " 5", " 6"):
            choice = {"index": 0, "text": text, "finish_reason": None, "logprobs": None}
            chunk = {"id": "1", "object": "text_completion", "created": 0, "model": "small",
                     "choices": [choice]}  # fmt: skip
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            time.sleep(0.01)
        self.wfile.write(b"data: [DONE]\n\n")

    def reply(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def serving(**changed: Any) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.models = [], [{"id": "small", "object": "model"}]
    for name, value in changed.items():
        setattr(server, name, value)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def settings(server: Server) -> Settings:
    return Settings(
        f"http://127.0.0.1:{server.server_port}/v1",
        "prose",
        True,
        32,
        4096,
        False,
        False,
        "a processor",
        2,
        {},
    )


def ask(server: Server, path: Path | None = None, timeout_s: float = 20) -> Records:
    """Three questions."""
    records = Records(path, settings(server))
    job = Job(settings(server), SETUPS, ["passkey"], [300], 3)
    run(job, Endpoint(settings(server), timeout_s, "-"), records, lambda text: None)
    return records


def test_answers_are_streamed_and_timed() -> None:
    with serving() as server:
        records = ask(server)
    assert [body["model"] for body in server.asked] == ["small"] * 3
    assert all(body["temperature"] == 0 for body in server.asked)
    for answer in records.answers.values():
        assert answer.output == "4 5 6"
        assert answer.score == 0.0
        assert 200 < answer.prompt_tokens <= 300
        assert answer.ttft_s > 0
        assert answer.decode_tok_s is not None
        assert 0 < answer.decode_tok_s < 110  # tokens are 10 ms apart, or more


@pytest.mark.parametrize(
    ("status", "message"),
    [(500, "answered 500"), (400, "answered 400"), (429, "answered 429"), (0, "not answer")],
)  # fmt: skip
def test_a_server_that_fails_part_way_loses_nothing(
    status: int, message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / "answers.jsonl"
    with (
        serving(fail_after=2, status=status) as server,
        pytest.raises(KvplugError, match=message) as caught,
    ):
        ask(server, path, timeout_s=20 if status else 3)
    assert "\n" not in str(caught.value)
    assert len(read(path)[1]) == 2


def test_a_server_that_is_not_there() -> None:
    with serving() as server:
        gone = settings(server)
    with pytest.raises(KvplugError, match="cannot be reached"):
        Endpoint(gone, 5, "-")


def test_a_server_without_a_model() -> None:
    with serving(models=[]) as server, pytest.raises(KvplugError, match="serves no model"):
        Endpoint(settings(server), 5, "-")
