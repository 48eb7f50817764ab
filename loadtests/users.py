"""Locust users that stream chat completions: an open loop and a closed one.

Importing this file imports locust, which replaces the process's sockets and locks by gevent's. So
only client processes and locustfiles import it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import gevent
from gevent.lock import BoundedSemaphore
from gevent.pool import Group
from locust import User, task
from locust.exception import StopUser

from kvplug.loadtests.client import Reply, StreamClient, clock
from kvplug.loadtests.records import Record, record_of
from kvplug.loadtests.workloads.base import Turn

APART, APART_S = 200, 0.005
"""Users of a closed loop that start at once, at most, and the seconds between them."""
STOPPED = "stopped"
"""Kind of failure of a request that the client broke off."""


@dataclass
class Prepared:
    """A session whose bodies are encoded: nothing is computed between the clock and the socket."""

    number: int
    turns: list[Turn]
    bodies: list[bytes]
    pauses: list[float]


@dataclass
class Plan:
    """What the users of one process do."""

    client: StreamClient
    sessions: deque[Prepared]
    """In the order in which they are taken."""
    arrivals: deque[float]
    """Seconds since the phase began, one for each session; of an open loop."""
    seconds: float
    """A closed loop begins no session after so many."""
    keep: Callable[[Record], None]
    where: dict[str, Any]
    """What every record says: ``setup``, ``phase``, ``process``."""
    most_in_flight: int = 1024
    zero: float = 0.0
    """Clock when the phase began."""
    in_flight: int = 0
    peak: int = 0
    """Most requests in flight at once."""
    sent: int = 0
    users: int = 0
    """That have started so far."""
    is_stopping: bool = False
    """Nothing more is begun, and what is in flight is broken off."""
    is_over: bool = False
    places: BoundedSemaphore = field(init=False)

    def __post_init__(self) -> None:
        """Makes the places."""
        self.places = BoundedSemaphore(self.most_in_flight)


class StreamingUser(User):
    """A user that holds sessions; how it comes by them is its loop's."""

    abstract = True
    plan: ClassVar[Plan]

    def hold(self, session: Prepared, intended: float) -> None:
        """Asks a session's turns one after the other, up to the first that fails.

        Args:
            session: What to ask.
            intended: Clock when the first turn should be sent.
        """
        for place, (asked, body) in enumerate(zip(session.turns, session.bodies, strict=True)):
            if place:
                intended = clock() + session.pauses[place - 1]
                gevent.sleep(session.pauses[place - 1])
            if self.plan.is_stopping:
                return
            record = self.ask(asked, body, intended, session=session.number, turn=place)
            if record.error is not None:
                return

    def ask(self, asked: Turn, body: bytes, intended: float, **where: int) -> Record:
        """One request; its record is kept whatever happens."""
        plan, reply = self.plan, Reply()
        free = intended
        if plan.places.locked():
            plan.places.acquire()
            free = clock()
        else:
            plan.places.acquire()
        plan.in_flight += 1
        plan.sent += 1
        plan.peak = max(plan.peak, plan.in_flight)
        try:
            plan.client.ask(body, reply)
        except gevent.GreenletExit:
            reply.fail(STOPPED, "the run ended first")
            raise
        finally:
            plan.in_flight -= 1
            plan.places.release()
            reply.end = reply.end or clock()
            record = record_of(reply, asked, plan.zero, intended, free, **plan.where, **where)
            plan.keep(record)
            self.tell(record)
        return record

    def tell(self, record: Record) -> None:
        """Tells locust: its pages then show the same, if rounded to two digits."""
        if record.error == STOPPED:
            return
        failure = None if record.error is None else RuntimeError(record.error)
        for name, seconds in (
            ("first token", record.ttft), ("between tokens", record.gap), ("total", record.total),
        ):  # fmt: skip
            if seconds is not None:
                self.environment.events.request.fire(
                    request_type="stream", name=name, response_time=1000 * seconds,
                    response_length=len(record.text), exception=failure, context={},
                )  # fmt: skip


class OpenLoopUser(StreamingUser):
    """Sends at the planned times, however many requests are still in flight.

    One such user does the work of a process: each session has a greenlet of its own.
    """

    fixed_count = 1

    def on_start(self) -> None:
        """Counts itself."""
        self.plan.users += 1

    @task
    def dispatch(self) -> None:
        """Starts every session at its time, then waits for all of them."""
        plan, group = self.plan, Group()
        while plan.sessions and not plan.is_stopping:
            at = plan.zero + plan.arrivals[0]
            if (early := at - clock()) > 0:
                # In short sleeps, so that a run that is stopped ends at once.
                gevent.sleep(min(early, 0.2))
                continue
            plan.arrivals.popleft()
            group.spawn(self.hold, plan.sessions.popleft(), at)
        try:
            group.join(raise_error=True)
        finally:
            group.kill()
        raise StopUser


class ClosedLoopUser(StreamingUser):
    """Takes the next session when its last one has ended."""

    def on_start(self) -> None:
        """Users that come together send a little apart: one process sends one at a time."""
        self.plan.users += 1
        gevent.sleep(self.plan.users % APART * APART_S)

    @task
    def take(self) -> None:
        """Holds one session."""
        plan, now = self.plan, clock()
        if not plan.sessions or plan.is_stopping or now - plan.zero >= plan.seconds:
            raise StopUser
        self.hold(plan.sessions.popleft(), now)
