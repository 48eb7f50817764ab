"""How much of the machine other programs took while a server was measured on it."""

from __future__ import annotations

import contextlib
import resource
from typing import NamedTuple

import psutil

from kvplug.loadtests.client import clock
from kvplug.machine import num_threads


class Spent(NamedTuple):
    """Seconds of CPU up to a moment."""

    at: float
    """Clock."""
    machine: float
    """Of all cores, that were not idle; what a hypervisor gave to others counts."""
    mine: float
    """Of the server, and of the client whose processes have ended."""


def spent(server: int) -> Spent:
    """What was spent so far.

    Args:
        server: Id of a server's process; its children count.
    """
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # A guest's time is in its host's user time already.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    mine = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(server)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                mine += sum(one.cpu_times()[:2])
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        mine += used.ru_utime + used.ru_stime
    return Spent(clock(), sum(times) - idle - guests, mine)


def share_of_others(before: Spent, after: Spent) -> float:
    """The share of the cores that others took between two moments, 0 to 1.

    Args:
        before: The first.
        after: The second.
    """
    seconds = (after.at - before.at) * num_threads()
    theirs = (after.machine - before.machine) - (after.mine - before.mine)
    return min(max(theirs / seconds, 0.0), 1.0) if seconds > 0 else 0.0
