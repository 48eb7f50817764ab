"""The same users for locust's own pages: ``locust -f loadtests/locustfile.py --host URL``.

A closed loop of as many users as locust is told. ``KVPLUG_LOAD_*`` in the environment chooses
workload, lengths, sessions and seed. Locust rounds times to two digits; for figures to keep, use
``kvplug load``, which starts client processes of its own and needs no locustfile.
"""

from __future__ import annotations

import locust  # isort: skip  # first of all: it replaces sockets and locks

import os
import time
from collections import deque
from typing import Any

from locust import events

from kvplug.loadtests.client import StreamClient
from kvplug.loadtests.contenders import running
from kvplug.loadtests.lengths import parse_lengths
from kvplug.loadtests.users import ClosedLoopUser, Plan, StreamingUser
from kvplug.loadtests.worker import prepare
from kvplug.loadtests.workloads import WORKLOADS
from kvplug.loadtests.workloads.base import Materials, sessions

__all__ = ["ClosedLoopUser"]
TIMEOUT_S = 600.0


def given(name: str, default: str) -> str:
    """A setting from the environment."""
    return os.environ.get(f"KVPLUG_LOAD_{name}", default)


@events.test_start.add_listener
def plan(environment: locust.env.Environment, **_: Any) -> None:
    """Writes the sessions before the first user starts."""
    from kvplug.models.tokenizer import build_tokenizer

    key = os.environ.get("OPENAI_API_KEY", "")
    (server,) = running([environment.host or "http://127.0.0.1:8000"])
    lengths = parse_lengths(given("LENGTHS", "fixed:8192"))
    short = parse_lengths(given("SHORT_LENGTHS", "uniform:256-1024"))
    materials = Materials(build_tokenizer(), lengths, short, seed=int(given("SEED", "0")))
    workload = WORKLOADS.get(given("WORKLOAD", "needles"))
    with server.ready(log=None, key=key) as ready:
        common = {"model": ready.model, "max_tokens": 32, "temperature": 0, "stream": True,
                  "stream_options": {"include_usage": True}}  # fmt: skip
    asked = sessions(workload, materials, 0, int(given("SESSIONS", "100")))
    StreamingUser.plan = Plan(
        StreamClient(server.url, key, TIMEOUT_S), deque(prepare(s, common) for s in asked),
        deque(), TIMEOUT_S * 1000, lambda _: None, {"setup": "", "phase": 0, "process": 0},
        zero=time.monotonic(),
    )  # fmt: skip
