"""Locust by itself runs the same users, and counts first tokens where it would count headers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kvplug.serve.server import Server

FILE = Path(__file__).parents[2] / "loadtests" / "locustfile.py"


def test_locust_streams(fake: Callable[..., Server]) -> None:
    server = fake("--ttft-s", "0.2", "--gap-s", "0.01")
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", str(FILE), "--headless", "-u", "2", "-r", "2",
         "-t", "3s", "--only-summary", "--host", server.url.removesuffix("/v1")],
        env={**os.environ, "KVPLUG_LOAD_LENGTHS": "fixed:300", "KVPLUG_LOAD_SESSIONS": "4"},
        cwd=FILE.parents[1], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    row = re.search(r"stream\s+first token\s+(\d+)\s+0\(0.00%\)[ |]+(\d+)\s+(\d+)", told)
    assert row is not None, told
    count, average, least = map(int, row.groups())
    assert count == 4
    assert average >= least >= 200
