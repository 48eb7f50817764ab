"""A server process is waited for, and gone afterwards whatever happened; failures are quoted."""

from __future__ import annotations

import contextlib
from pathlib import Path

import httpx
import psutil
import pytest

from kvplug.errors import KvplugError
from kvplug.serve import server
from kvplug.serve.server import free_port, last_words, running_server

HEALTHY = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, "extra", os.environ["EXTRA"], flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

host, port = sys.argv[-3], int(sys.argv[-1])
http.server.HTTPServer((host, port), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child above outlives its parent, so it is killed when patience ends."""
    monkeypatch.setattr(server, "STOP_TIMEOUT_S", 0.5)


def is_gone(pid: int) -> bool:
    """Within seconds; one that nobody has reaped yet is gone as well."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(5)
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def child_of(log: Path) -> int:
    return int(log.read_text().split()[1])


def test_it_serves_while_the_context_lasts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_server(["-c", HEALTHY], {"EXTRA": "42"}, log) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert server.url.endswith("/v1")
        assert httpx.get(f"{server.url}/models").status_code == 200
        child = child_of(log)
        assert psutil.pid_exists(child)
    assert "extra 42" in log.read_text()
    assert is_gone(child)
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url)


def test_it_ends_when_the_caller_fails(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def fail() -> None:
        with running_server(["-c", HEALTHY], {"EXTRA": ""}, log):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert is_gone(child_of(log))


def test_a_server_that_dies_is_quoted(tmp_path: Path) -> None:
    dying = "import sys; print('first'); print('the reason'); sys.exit(3)"
    with (
        pytest.raises(KvplugError, match="exit code 3: the reason"),
        running_server(["-c", dying], {}, tmp_path / "log"),
    ):
        raise AssertionError


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"")
    assert last_words(log) == "no words"
    log.write_bytes(b"a\nb\n c \xff\n")
    assert last_words(log) == "c \ufffd"
    log.write_bytes(b"x ValueError: the cause\nRuntimeError: see above\nbye")
    assert last_words(log) == "ValueError: the cause"


def test_free_ports_are_free() -> None:
    assert 0 < free_port() < 65536


def test_an_engine_that_dies_is_quoted_though_its_front_end_lives(tmp_path: Path) -> None:
    dying = (
        "import time; print('x WARNING y: `OSError: many files`'); print('KvplugError: no room');"
        "print('vllm.EngineDeadError: it died', flush=True); time.sleep(600)"
    )
    with (
        pytest.raises(KvplugError, match="engine died: KvplugError: no room"),
        running_server(["-c", dying], {}, tmp_path / "log"),
    ):
        raise AssertionError
