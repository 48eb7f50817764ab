"""The client's clocks are those of the wire, and every way to fail has a name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvplug.loadtests.client import Reply, StreamClient, take_event
from kvplug.serve.server import Server, free_port, running_server
from tests.loadtests.conftest import FAKE

QUESTION = "The password of the inn is blue harbor six. What is the password of the inn?"
LATE_S = 0.5
"""A bound that a busy machine keeps, and that clients with buffers miss by a second."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("fake") / "log"
    with running_server([*FAKE, "--ttft-s", "0.02", "--gap-s", "0.001"], {}, log) as server:
        yield server


def asked(server: Server, timeout_s: float = 20.0, **fields: Any) -> Reply:
    body = {
        "model": "fake", "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": QUESTION}], **fields,
    }  # fmt: skip
    reply = Reply()
    StreamClient(server.url, "", timeout_s).ask(json.dumps(body).encode(), reply)
    return reply


def test_known_delays_are_found(server: Server) -> None:
    reply = asked(server, ignore_eos=True, fake={"ttft_s": 0.1, "gap_s": 0.2})
    assert reply.error is None
    assert len(reply.stamps) == 8
    for place, stamp in enumerate(reply.stamps):
        due = 0.1 + 0.2 * place
        assert due <= stamp - reply.sent < due + LATE_S
    assert reply.end >= reply.stamps[-1]


def test_the_answer_and_what_the_server_counted(server: Server) -> None:
    reply = asked(server)
    assert "".join(reply.parts) == "blue harbor six."
    assert reply.finish == "stop"
    assert reply.usage == {"prompt_tokens": len(QUESTION.split()), "completion_tokens": 3}
    assert reply.is_done


def test_cut_pieces_change_nothing(server: Server) -> None:
    reply = asked(server, fake={"fault": "split"})
    assert (reply.error, "".join(reply.parts)) == (None, "blue harbor six.")


@pytest.mark.parametrize(
    ("fault", "error", "detail", "pieces"),
    [
        ("http 500", "http 500", "made to fail", 0),
        ("http 503", "http 503", "made to fail", 0),
        ("html", "not a stream", "text/html: <html>a proxy", 0),
        ("cut", "cut off", "without [DONE]", 2),
        ("no done", "cut off", "without [DONE]", 3),
        ("not json", "bad event", "Expecting property name", 2),
        ("error event", "error event", "broke", 2),
        ("empty", "empty", "no text", 0),
    ],
)
def test_failures_have_names(
    server: Server, fault: str, error: str, detail: str, pieces: int
) -> None:
    reply = asked(server, fake={"fault": fault})
    assert reply.error == error
    assert detail in reply.detail
    assert len(reply.stamps) == pieces
    assert reply.end >= reply.sent > 0


def test_a_server_that_is_not_there() -> None:
    assert asked(Server(f"http://127.0.0.1:{free_port()}/v1", 0)).error == "refused"


@pytest.mark.parametrize("fake", [{"ttft_s": 30}, {"ttft_s": 0, "gap_s": 0.2}])
def test_a_request_that_takes_too_long(server: Server, fake: dict[str, float]) -> None:
    """Before the first byte, and while bytes still come."""
    reply = asked(server, timeout_s=0.5, ignore_eos=True, fake=fake)
    assert reply.error == "timeout"
    assert reply.end - reply.sent < 5


def test_what_counts_as_text() -> None:
    reply = Reply()

    def take(now: float, **delta: Any) -> None:
        take_event(json.dumps({"choices": [{"delta": delta}]}).encode(), now, reply)

    take(1.0, role="assistant", content="")
    take(2.0, reasoning="hm")
    take(3.0, content="yes")
    take(4.0)
    assert reply.stamps == [2.0, 3.0]
    assert reply.parts == ["hm", "yes"]
    with pytest.raises(ValueError, match="not an object"):
        take_event(b"[1]", 5.0, reply)


def test_the_key_is_sent_and_the_environments_proxy_is_not_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{free_port()}")
    client = StreamClient(server.url, "a key", 5.0)
    assert client._http.headers["authorization"] == "Bearer a key"
    assert asked(server).error is None


def test_warming_up_costs_no_error(fake: Callable[..., Server]) -> None:
    StreamClient(f"http://127.0.0.1:{free_port()}/v1", "", 1.0).warm_up()
