"""What a load test was measured on and with, told with its figures."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvplug.loadtests.contenders import Contender
from kvplug.machine import num_threads, processor, versions

PACKAGES = ("locust", "gevent", "httpx")


def environment(contenders: Sequence[Contender], made_by: str) -> dict[str, Any]:
    """Machine, versions, and how each server was started.

    Args:
        contenders: Servers.
        made_by: The command.
    """
    client = {}
    for name in PACKAGES:
        try:
            client[name] = version(name)
        except PackageNotFoundError:
            client[name] = "none"
    servers = {c.label: c.url or _told(c) for c in contenders}
    return {
        "command": made_by, "processor": processor(), "threads": num_threads(),
        "system": platform.system(), "python": platform.python_version(),
        "versions": {**versions(), **client}, "servers": servers,
    }  # fmt: skip


def _told(contender: Contender) -> str:
    """A command without the folder of a bundled model, which is this machine's."""
    words = contender.command
    return " ".join("MODEL" if i and words[i - 1] == "serve" else w for i, w in enumerate(words))
