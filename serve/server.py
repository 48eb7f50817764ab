"""A server process on loopback: started, waited for, ended by its own id."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from kvplug.errors import KvplugError

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
ENGINE_DIED = "EngineDeadError"


class Server(NamedTuple):
    """One that runs."""

    url: str
    """Base URL of the OpenAI API, ``http://127.0.0.1:P/v1``."""
    pid: int


def free_port() -> int:
    """A TCP port that nothing on loopback listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_server(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[Server]:
    """Runs ``python ARGUMENTS --host 127.0.0.1 --port P`` while the context lasts.

    Args:
        arguments: Of the Python interpreter, up to the flags of the server.
        environment: Added to this process's.
        log: File that takes everything it prints.

    Yields:
        The server.

    Raises:
        KvplugError: It ended, or was not ready in time; the message ends with its last words.
    """
    port = free_port()
    command = [sys.executable, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield Server(f"http://127.0.0.1:{port}/v1", process.pid)
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Polls the health endpoint."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise KvplugError(
                f"The server ended with exit code {process.returncode}: {last_words(log)}"
            )
        if ENGINE_DIED in log.read_text(errors="replace"):
            # vLLM's front end can outlive its engine.
            raise KvplugError(f"The server's engine died: {last_words(log)}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise KvplugError(f"The server was not ready in {START_TIMEOUT_S:.0f} s: {last_words(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and the children it started, politely first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for survivor in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                survivor.kill()
        psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
    process.wait()


def last_words(log: Path) -> str:
    """Why a server ended: the first error that its log names, or else its last line.

    Warnings that quote errors do not count.
    """
    lines = log.read_text(errors="replace").strip().splitlines()
    text = "\n".join(line for line in lines if " WARNING " not in line)
    errors = re.findall(r"\b\w+(?:Error|Exception): .+", text)
    return str(errors[0]) if errors else text.splitlines()[-1].strip() if text else "no words"
