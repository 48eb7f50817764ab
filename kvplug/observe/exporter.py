"""Tells counters now and then, from a thread, so that no step waits for them."""

from __future__ import annotations

import atexit
import threading
import weakref
from typing import Any, Protocol

from kvplug.observe.counters import Counters

INTERVAL_S = 0.5


class Counted(Protocol):
    """Something that counts."""

    @property
    def counts(self) -> Any:
        """What it counted since it was made."""


class Exporter:
    """Tells what every source counted, until the last of them is gone."""

    def __init__(self) -> None:
        """Starts without sources."""
        self._sources: list[tuple[weakref.ref[Any], Counters]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        atexit.register(self.tell)

    def add(self, source: Counted, counters: Counters) -> None:
        """Adds a source, which it does not keep alive.

        Args:
            source: Counts.
            counters: Are told.
        """
        with self._lock:
            self._sources.append((weakref.ref(source), counters))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="kvplug-metrics", daemon=True
                )
                self._thread.start()

    def tell(self) -> None:
        """Tells what came since the last time."""
        with self._lock:
            alive = [(source(), counters) for source, counters in self._sources]
            self._sources = [
                pair
                for pair, (source, _) in zip(self._sources, alive, strict=True)
                if source is not None
            ]
            for source, counters in alive:
                if source is not None:
                    counters.tell(source.counts)

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(INTERVAL_S)
            self.tell()
            with self._lock:
                if not self._sources:
                    self._thread = None
                    return


EXPORTER = Exporter()
"""The process's."""
