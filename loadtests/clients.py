"""The parent's side of client processes: started together, watched, ended by their own ids."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug.errors import KvplugError
from kvplug.loadtests.client import KEY, clock
from kvplug.serve.server import last_words

START_S = 120.0
"""For a client process to load its sessions."""
HEAD_START_S = 0.25
"""Between the word to go and the first request, for every process to hear it."""
PATIENCE_S = 10.0
"""For a client process to break off and end."""
POLL_S = 0.2


@dataclass(frozen=True)
class Task:
    """One phase for one server."""

    common: dict[str, Any]
    """What every process's job says; see :mod:`kvplug.loadtests.worker`."""
    processes: int
    arrivals: Sequence[float]
    """Of all processes together; empty for a closed loop."""


class Clients:
    """The client processes of a phase."""

    def __init__(self, processes: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
        """Takes over processes that were just started."""
        self.processes, self._logs = processes, logs

    def start(self) -> float:
        """Waits until all are loaded, then lets them go; the clock of the phase's beginning.

        Raises:
            KvplugError: One ended first.
        """
        for process in self.processes:
            assert process.stdout is not None
            if process.stdout.readline().strip() != b"ready":
                process.wait(PATIENCE_S)
                raise KvplugError(f"A client process could not start: {self._words(process)}")
        zero = clock() + HEAD_START_S
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"go {zero!r}\n".encode())
            process.stdin.flush()
        return zero

    def wait(self, until: float, check: Callable[[], str | None]) -> str | None:
        """Waits for their end; why they were broken off, or None.

        Args:
            until: Clock at which they are.
            check: Says why the run has no sense any more; None while it has.

        Raises:
            KvplugError: One failed by itself.
        """
        while any(process.poll() is None for process in self.processes):
            reason = check()
            if reason is None and clock() > until:
                reason = "it took longer than it may"
            if reason is not None:
                self.stop()
                return reason
            time.sleep(POLL_S)
        for process in self.processes:
            if process.returncode:
                raise KvplugError(f"A client process failed: {self._words(process)}")
        return None

    def stop(self) -> None:
        """Lets them break off; kills those that do not."""
        for process in self.processes:
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        for process in self.processes:
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _words(self, process: subprocess.Popen[bytes]) -> str:
        return last_words(self._logs[self.processes.index(process)])


@contextlib.contextmanager
def client_processes(task: Task, key: str) -> Iterator[Clients]:
    """Client processes while the context lasts.

    Args:
        task: What they do together.
        key: API key.
    """
    started: list[subprocess.Popen[bytes]] = []
    logs: list[Path] = []
    clients = Clients(started, logs)
    with tempfile.TemporaryDirectory(prefix="kvplug-load-") as folder:
        try:
            for number in range(task.processes):
                job = {
                    **task.common, "process": number, "processes": task.processes,
                    "arrivals": list(task.arrivals[number :: task.processes]),
                }  # fmt: skip
                path, log = Path(folder, f"{number}.json"), Path(folder, f"{number}.log")
                path.write_text(json.dumps(job))
                logs.append(log)
                with log.open("wb") as errors:
                    started.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "kvplug.loadtests.worker", str(path)],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                            env={**os.environ, KEY: key},
                            # Ctrl-C is for the parent, who then lets them write what they have.
                            start_new_session=True,
                        )
                    )  # fmt: skip
            yield clients
        finally:
            clients.stop()
