"""One client process: ``python -m kvplug.loadtests.worker JOB``, a file of JSON.

It says ``ready`` when everything is loaded, is told ``go CLOCK`` on standard input, and runs one
phase. When standard input closes, the run is over or its parent is gone: it breaks off and ends.
"""

from __future__ import annotations

import locust  # isort: skip  # first of all: it replaces sockets and locks

import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import gevent
from gevent.socket import wait_read
from locust.env import Environment

from kvplug.loadtests.client import KEY, StreamClient, clock
from kvplug.loadtests.records import Appender
from kvplug.loadtests.shapes import Phase
from kvplug.loadtests.users import ClosedLoopUser, OpenLoopUser, Plan, Prepared, StreamingUser
from kvplug.loadtests.workloads.base import Session, Turn

SPAWN_PER_S = 100.0
"""The most that locust does in good order."""
BEAT_S = 0.01
"""Sleep by which the event loop's lateness is measured."""


def read_session(line: str) -> Session:
    """A session as JSON."""
    number, turns, pauses = json.loads(line)
    return Session(number, [Turn(*turn) for turn in turns], pauses)


def prepare(session: Session, common: dict[str, Any]) -> Prepared:
    """Encodes the bodies of a session's requests.

    Args:
        session: What is asked.
        common: Fields of every body.
    """
    bodies = [
        json.dumps({**common, "messages": turn.messages, **turn.extra}).encode()
        for turn in session.turns
    ]
    return Prepared(session.number, session.turns, bodies, session.pauses)


def slice_of(job: dict[str, Any]) -> deque[Prepared]:
    """This process's part of the sessions: every n-th."""
    with open(job["sessions"]) as file:
        mine = [line for i, line in enumerate(file) if i % job["processes"] == job["process"]]
    return deque(prepare(read_session(line), job["common"]) for line in mine)


def shape_of(phase: Phase, process: int, processes: int, plan: Plan) -> locust.LoadTestShape:
    """A closed loop's shape: this process's part of the users, who are told to leave by level."""

    class UsersOverTime(locust.LoadTestShape):
        def tick(self) -> tuple[int, float] | None:
            at = clock() - plan.zero
            if at >= phase.seconds or not plan.sessions:
                return None
            users = round(phase.level(at))
            return len(range(process, users, processes)), SPAWN_PER_S

    make: Any = UsersOverTime  # its base's __init__ has no types
    return make()


def pulse(plan: Plan, lines: Appender) -> None:
    """Once a second: how late this process's loop is, and what it costs."""
    while not plan.is_over:
        begun, used, late = clock(), time.process_time(), []
        while clock() - begun < 1 and not plan.is_over:
            before = clock()
            gevent.sleep(BEAT_S)
            late.append(round(clock() - before - BEAT_S, 6))
        lines.add({
            "kind": "client", **plan.where, "at": begun - plan.zero,
            "cpu": (time.process_time() - used) / (clock() - begun), "late": late,
            "in_flight": plan.in_flight, "peak": plan.peak, "sent": plan.sent,
        })  # fmt: skip


def hear(plan: Plan) -> None:
    """Stops the plan when standard input ends."""
    wait_read(sys.stdin.fileno())
    plan.is_stopping = True


def main(path: str) -> None:
    """Runs a job."""
    job = json.loads(Path(path).read_text())
    records, samples = Appender(Path(job["records"])), Appender(Path(job["samples"]))
    where = {"setup": job["setup"], "phase": job["phase"], "process": job["process"]}
    plan = Plan(
        StreamClient(job["url"], os.environ.get(KEY, ""), job["timeout_s"]), slice_of(job),
        deque(job["arrivals"]), job["times"][-1], records.add, where, job["most_in_flight"],
    )  # fmt: skip
    plan.client.warm_up()
    print("ready", flush=True)
    wait_read(sys.stdin.fileno())
    word, _, zero = os.read(sys.stdin.fileno(), 100).decode().strip().partition(" ")
    if word != "go":
        return
    plan.zero = float(zero)
    beats, ear = gevent.spawn(pulse, plan, samples), gevent.spawn(hear, plan)
    gevent.sleep(max(0.0, plan.zero - clock()))
    run(job, plan)
    plan.is_over = True
    beats.join()
    ear.kill()


def run(job: dict[str, Any], plan: Plan) -> None:
    """Runs the users until all are done, or the plan is stopped."""
    user = OpenLoopUser if job["loop"] == "open" else ClosedLoopUser
    StreamingUser.plan = plan
    phase = Phase("", tuple(job["times"]), tuple(job["levels"]))
    environment = Environment(user_classes=[user], stop_timeout=job["drain_s"])
    runner = environment.create_local_runner()
    if job["loop"] == "open":
        runner.start(1, spawn_rate=SPAWN_PER_S)
    else:
        environment.shape_class = shape_of(phase, job["process"], job["processes"], plan)
        environment.shape_class.runner = runner
        runner.start_shape()
    while not plan.is_stopping:
        shape = runner.shape_greenlet
        if not runner.user_count and (plan.users if shape is None else shape.ready()):
            break
        gevent.sleep(0.05)
    environment.stop_timeout = 0.0
    runner.quit()
    if runner.exceptions:
        raise RuntimeError(next(iter(runner.exceptions.values()))["traceback"])


if __name__ == "__main__":
    main(sys.argv[1])
