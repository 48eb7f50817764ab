"""What a load test is asked to do, checked before anything starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from kvplug.errors import KvplugError, nearest_name
from kvplug.loadtests.arrivals import PROCESSES
from kvplug.loadtests.lengths import LONGEST, parse_lengths
from kvplug.loadtests.shapes import Phase, phases
from kvplug.loadtests.workloads import WORKLOADS

LOOPS = ("closed", "open")
MOST_REQUESTS = 100_000
MOST_SECONDS = 86_400.0


@dataclass(frozen=True)
class Settings:
    """A load test. Everything that is drawn comes from these fields."""

    loop: str
    """``open``: requests go out when they are due. ``closed``: when a user's last one has ended."""
    process: str
    """Of arrivals in an open loop: ``poisson`` or ``constant``."""
    shape: str
    levels: tuple[float, ...]
    """Requests per second of an open loop, users of a closed one."""
    seconds: float
    """Of the shape; of every level of a sweep."""
    requests: int
    """Sessions of a phase, at most."""
    workload: str
    lengths: str
    short_lengths: str
    short_share: float
    documents: int
    turns: int
    pause_s: float
    output_tokens: int
    """Of an answer, at most."""
    ignore_eos: bool
    """Every answer has exactly that many."""
    seed: int
    processes: int
    """Of the client."""
    timeout_s: float
    """For a request."""
    most_in_flight: int
    """Requests of one client process at once; others wait, which is reported."""
    most_s: float
    """For everything that one server is asked; then the run is partial."""
    warmups: int
    """Requests before the first that counts, each as long as the longest."""
    scrape_s: float
    """Between looks at the server's /metrics; 0: none but before and after."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            KvplugError: The first that is wrong.
        """
        if self.loop not in LOOPS:
            raise KvplugError(f"Unknown loop {self.loop!r}: {nearest_name(self.loop, LOOPS)}.")
        PROCESSES.get(self.process)
        WORKLOADS.get(self.workload)
        for text in (self.lengths, self.short_lengths):
            parse_lengths(text)
        shaped = self.phases()
        if self.loop == "closed" and any(level % 1 for level in self.levels):
            raise KvplugError("A closed loop's levels are users: give whole numbers.")
        limits = {
            "requests": (self.requests, 1, MOST_REQUESTS),
            "short-share": (self.short_share, 0, 1), "documents": (self.documents, 1, 10_000),
            "turns": (self.turns, 1, 64), "pause": (self.pause_s, 0, 3600),
            "output-tokens": (self.output_tokens, 1, LONGEST),
            "processes": (self.processes, 1, 64), "timeout": (self.timeout_s, 0.1, MOST_SECONDS),
            "most-in-flight": (self.most_in_flight, 1, 16_384),
            "most-minutes": (self.most_s / 60, 0.01, MOST_SECONDS / 60),
            "warmups": (self.warmups, 0, 100), "scrape": (self.scrape_s, 0, 3600),
            "seconds": (sum(phase.seconds for phase in shaped), 0.01, MOST_SECONDS),
        }  # fmt: skip
        for name, (value, least, most) in limits.items():
            if not least <= value <= most:
                raise KvplugError(
                    f"--{name} gives {value:g}; it must lie between {least:g} and {most:g}."
                )

    def phases(self) -> list[Phase]:
        """The load's phases."""
        return phases(self.shape, self.levels, self.seconds)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; conversations grow a little beyond it."""
        longest = parse_lengths(self.lengths).longest
        if self.workload == "mixed":
            longest = max(longest, parse_lengths(self.short_lengths).longest)
        return longest + (64 * self.turns if self.workload == "multi-turn" else 0)

    def body(self, model: str) -> dict[str, Any]:
        """What every request's body says.

        Args:
            model: As the server calls it.
        """
        body: dict[str, Any] = {
            "model": model, "max_tokens": self.output_tokens, "temperature": 0, "stream": True,
            "seed": self.seed, "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body

    def to_json(self) -> dict[str, Any]:
        """For the run's file."""
        return asdict(self)


def check_url(url: str, is_given: bool) -> str:
    """A base URL ending in ``/v1``.

    Args:
        url: What traffic goes to.
        is_given: Whether the user named it; otherwise it must be this machine.

    Raises:
        KvplugError: It is not a URL of HTTP, or not loopback though nobody named it.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise KvplugError(f"{url!r} must be a URL like http://127.0.0.1:8000/v1.")
    if not is_given and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise KvplugError(f"{url!r} is not on this machine: load goes elsewhere only with --url.")
    return f"{url.rstrip('/').removesuffix('/v1')}/v1"
