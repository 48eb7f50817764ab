"""One line of JSON for every request, written when it ends: a run that dies loses nothing."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvplug.errors import KvplugError
from kvplug.loadtests.client import Reply
from kvplug.loadtests.workloads.base import Turn

TEXT = 2000
"""Characters kept of an answer."""


@dataclass(frozen=True)
class Record:
    """A request as the client saw it. Times are seconds since its phase began."""

    setup: str
    """What was asked."""
    phase: int
    session: int
    turn: int
    kind: str
    process: int
    """Of the client's."""
    intended: float
    """When the schedule says it goes out; in a closed loop, when its user was ready."""
    free: float
    """When a place was free for it: later than intended only at the limit of requests in flight."""
    sent: float
    first: float | None
    """The first text; None: none came."""
    end: float
    gaps: list[float]
    """Seconds between pieces of text."""
    prompt_tokens: int | None
    """As the server counted them; None: it did not say."""
    completion_tokens: int | None
    cached_tokens: int | None
    finish: str | None
    text: str
    expected: str
    right: bool | None
    """Whether the answer holds the expected words; None: nothing is expected, or it failed."""
    error: str | None
    detail: str

    @property
    def key(self) -> tuple[int, int, int]:
        """The same for the same request to another setup."""
        return self.phase, self.session, self.turn

    @property
    def ttft(self) -> float | None:
        """Seconds from the intended time to the first text."""
        return None if self.first is None else self.first - self.intended

    @property
    def ttft_sent(self) -> float | None:
        """Seconds from sending to the first text."""
        return None if self.first is None else self.first - self.sent

    @property
    def total(self) -> float:
        """Seconds from the intended time to the end."""
        return self.end - self.intended

    @property
    def lag(self) -> float:
        """Seconds that the client itself was late."""
        return self.sent - max(self.intended, self.free)

    @property
    def gap(self) -> float | None:
        """Mean seconds between tokens; None for a single piece."""
        if not self.gaps:
            return None
        tokens = self.completion_tokens
        count = len(self.gaps) if tokens is None or self.is_token_by_token else tokens - 1
        return sum(self.gaps) / max(count, 1)

    @property
    def is_token_by_token(self) -> bool:
        """Whether every piece of text was one token, so that gaps are between tokens.

        The last token of a turn that ends by itself has no text.
        """
        pieces, tokens = len(self.gaps) + 1, self.completion_tokens
        return tokens is not None and pieces in (tokens, tokens - 1)


def record_of(
    reply: Reply, asked: Turn, zero: float, intended: float, free: float, **where: Any
) -> Record:
    """A record of a finished request.

    Args:
        reply: What came.
        asked: What was asked.
        zero: Clock when the phase began.
        intended: Clock when it should have been sent.
        free: Clock when there was a place for it.
        where: ``setup``, ``phase``, ``session``, ``turn``, ``process``.
    """
    text = "".join(reply.parts)
    wanted = words(asked.expected)
    details = reply.usage.get("prompt_tokens_details") or {}
    return Record(
        kind=asked.kind, intended=intended - zero, free=free - zero, sent=reply.sent - zero,
        first=reply.stamps[0] - zero if reply.stamps else None, end=reply.end - zero,
        gaps=[round(b - a, 6) for a, b in itertools.pairwise(reply.stamps)],
        prompt_tokens=reply.usage.get("prompt_tokens"),
        completion_tokens=reply.usage.get("completion_tokens"),
        cached_tokens=details.get("cached_tokens"), finish=reply.finish, text=text[:TEXT],
        expected=asked.expected,
        right=wanted in words(text) if wanted and reply.error is None else None,
        error=reply.error, detail=reply.detail, **where,
    )  # fmt: skip


def words(text: str) -> str:
    """Lower-case words with a space on both sides of each, and none of the punctuation."""
    kept = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return f" {' '.join(kept)} " if kept else ""


class Appender:
    """Appends lines to a file that several processes write to.

    A line goes out in one write to the file's end, so lines of processes do not mix.
    """

    def __init__(self, path: Path) -> None:
        """Opens it."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, line: Any) -> None:
        """Writes an object, a dataclass or a dict, as JSON."""
        told = line if isinstance(line, dict) else asdict(line)
        os.write(self._file, json.dumps(told).encode() + b"\n")

    def close(self) -> None:
        """Closes it."""
        os.close(self._file)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; one that was cut off does not count. No file, no lines.

    Raises:
        KvplugError: A line is not JSON.
    """
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines()
    try:
        return [json.loads(line) for line in whole]
    except ValueError:
        raise KvplugError(f"{str(path)!r} is not a file of JSON lines.") from None


def read_records(path: Path) -> list[Record]:
    """The requests in a file.

    Raises:
        KvplugError: It is not a file of requests.
    """
    names = {field.name for field in fields(Record)}
    lines = read_lines(path)
    if any(line.keys() != names for line in lines):
        raise KvplugError(f"{str(path)!r} is not a file of this version's requests.")
    return [Record(**line) for line in lines]
