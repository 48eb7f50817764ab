"""What a server's /metrics say while it is under load, for the panels of the page."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable
from types import TracebackType

import httpx

from kvplug.loadtests.client import clock

WANTED = re.compile(
    r"vllm:(?:kv_cache_usage_perc|num_requests_running|num_requests_waiting"
    r"|prefix_cache_(?:queries|hits)_total|num_preemptions_total"
    r"|(?:prompt|generation)_tokens_total)|kvplug:\w+"
)
_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{[^}]*\})? (\S+)")
TIMEOUT_S = 10.0


def values_of(text: str) -> dict[str, float]:
    """The wanted metrics of a page in Prometheus's text format, summed over their labels.

    Buckets of histograms are left out.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        part = _LINE.match(line)
        if part is None or part.group(1).endswith(("_bucket", "_created")):
            continue
        if WANTED.fullmatch(part.group(1)):
            with contextlib.suppress(ValueError):
                found[part.group(1)] = found.get(part.group(1), 0.0) + float(part.group(2))
    return found


class Sampler:
    """Looks at /metrics now and then, in a thread, while its context lasts; and at both ends.

    Args:
        url: The server's, up to ``/v1``.
        every_s: Seconds between looks; 0: only at both ends.
        keep: Given the clock and what there was.
    """

    def __init__(
        self, url: str, every_s: float, keep: Callable[[float, dict[str, float]], None]
    ) -> None:
        """Does nothing yet."""
        self._url = f"{url.removesuffix('/v1')}/metrics"
        self._every_s, self._keep = every_s, keep
        self._http = httpx.Client(
            timeout=TIMEOUT_S, trust_env=False, verify=url.startswith("https")
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        """Begins."""
        self._look()
        if self._every_s:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Ends."""
        self._over.set()
        if self._every_s:
            self._thread.join(TIMEOUT_S)
        self._look()
        self._http.close()

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        """One look; a server that does not say costs nothing but the panel."""
        with contextlib.suppress(httpx.TransportError):
            reply = self._http.get(self._url)
            if reply.status_code == 200:
                self._keep(clock(), values_of(reply.text))
