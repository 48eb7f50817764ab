"""Engines in processes of their own that begin with vLLM imported.

Two thirds of an engine's start are imports. Here one process does them once, and every engine is a
fork of it, made before any thread runs or any of kvplug is loaded.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path

# Nothing that vLLM itself does not import: stock vLLM stumbles over numba's modules.
IMPORTED = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
]
_processes = multiprocessing.get_context("forkserver")


def threads() -> str:
    """Threads of an engine: all, or one where another test process has the other core."""
    return "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"


def run_main(
    module: str, text: str, environment: Mapping[str, str] | None = None, seconds: float = 600
) -> subprocess.CompletedProcess[str]:
    """Runs the ``main()`` of a module of ``tests.engine`` to its end, whatever that is.

    Args:
        module: Its name.
        text: Its standard input.
        environment: Beside this process's own; what torch reads when imported has no effect.
        seconds: It may take.

    Raises:
        subprocess.TimeoutExpired: It took longer, and is dead.
    """
    _begin()
    with tempfile.TemporaryDirectory() as folder:
        arguments = module, text, folder, {**os.environ, **(environment or {})}
        process = _processes.Process(target=_main, args=arguments)
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(module, seconds)
        said = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess([module], process.exitcode, *said)


@cache
def _begin() -> None:
    """Starts the process that imports; it reads its threads from the environment."""
    mine = {"OMP_NUM_THREADS": threads(), "NUMBA_NUM_THREADS": threads(),
            "VLLM_LOGGING_LEVEL": "WARNING"}  # fmt: skip
    before = dict(os.environ)
    os.environ.update(mine)
    try:
        _processes.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _main(module: str, text: str, folder: str, environment: dict[str, str]) -> None:
    """In the fork."""
    os.environ.update(environment)
    for stream, name in ((1, "out"), (2, "err")):
        with Path(folder, name).open("w") as file:
            os.dup2(file.fileno(), stream)
    sys.stdin = io.StringIO(text)
    import_module(f"tests.engine.{module}").main()
