"""What the client itself adds: its times of a fake server's answers, whose delays are known."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from kvplug.errors import KvplugError
from kvplug.loadtests.client import clock
from kvplug.loadtests.clients import Task, client_processes
from kvplug.loadtests.fake_server import MODEL
from kvplug.loadtests.records import read_lines, read_records
from kvplug.loadtests.scrape import values_of
from kvplug.serve.server import running_server

STREAMS = 20
REQUESTS_PER_STREAM = 4
TOKENS = 25
GAP_S = 0.02
FIRST_S = (0.05, 0.15)
"""Delays of first tokens are drawn evenly between these."""
LIMIT_S = 0.005
"""Error of a first token that is still believed."""
LONGEST_S = 120.0
LATE_P50, LATE_MAX = "kvplug:fake_late_p50_seconds", "kvplug:fake_late_max_seconds"


@dataclass(frozen=True)
class Calibration:
    """Errors of the client in seconds: measured less known, always with the fake server's own."""

    streams: int
    processes: int
    requests: int
    ttft_p50: float
    ttft_p95: float
    ttft_max: float
    gap_p50: float
    """Of single gaps, without sign, as all that follow."""
    gap_p95: float
    zero_gaps: float
    """Share of gaps that are none: tokens that came in one piece though they were sent apart."""
    cpu: float
    """Share of a core that the busiest client process took."""
    late_p50: float
    """What of it is the fake server's: how late its tokens went out."""
    late_max: float

    @property
    def is_believable(self) -> bool:
        """Whether 95% of first tokens are within the limit."""
        return self.ttft_p95 < LIMIT_S


def sessions(count: int, seed: int) -> list[list[Any]]:
    """Short questions, each with a delay of its own, as :class:`Session` in JSON."""
    draw = random.Random(f"calibration {seed}")
    return [
        [i, [[[{"role": "user", "content": "What is a? a is b c."}], "", "fake", 0,
              {"fake": {"ttft_s": draw.uniform(*FIRST_S), "gap_s": GAP_S}}]], []]
        for i in range(count)
    ]  # fmt: skip


def calibrate(streams: int, processes: int, seed: int, say: Callable[[str], None]) -> Calibration:
    """Measures the client against a fake server.

    Args:
        streams: At once.
        processes: Of the client.
        seed: Of the delays.
        say: Told what is going on.

    Returns:
        The errors.

    Raises:
        KvplugError: Numbers out of range, or requests that failed.
    """
    if not processes <= streams <= 1000 or processes < 1:
        raise KvplugError("Calibration takes 1 to 1000 streams, and no more processes than those.")
    say(f"calibrating the client with {streams} streams of known delays")
    asked = sessions(streams * REQUESTS_PER_STREAM, seed)
    with tempfile.TemporaryDirectory(prefix="kvplug-load-") as name:
        folder = Path(name)
        (folder / "sessions").write_text("".join(json.dumps(session) + "\n" for session in asked))
        command = ["-m", "kvplug.loadtests.fake_server", "--gap-s", str(GAP_S)]
        with running_server(command, {}, folder / "log") as server:
            common = {
                "url": server.url, "loop": "closed", "times": [0.0, LONGEST_S],
                "levels": [streams, streams], "setup": MODEL, "phase": 0, "timeout_s": 30.0,
                "drain_s": 30.0, "most_in_flight": streams, "sessions": str(folder / "sessions"),
                "records": str(folder / "records"), "samples": str(folder / "samples"),
                "common": {"model": MODEL, "max_tokens": TOKENS, "ignore_eos": True,
                           "stream": True, "stream_options": {"include_usage": True}},
            }  # fmt: skip
            task = Task(common, processes, [])
            with client_processes(task, "") as clients:
                begun = clients.start()
                clients.wait(begun + LONGEST_S, lambda: None)
            assert clock() > begun
            told = values_of(httpx.get(server.url.replace("/v1", "/metrics")).text)
        return _errors(folder, asked, streams, processes, told)


def _errors(
    folder: Path, asked: list[list[Any]], streams: int, processes: int, told: dict[str, float]
) -> Calibration:
    """Sets what was measured against what is known."""
    records = read_records(folder / "records")
    failed = [record for record in records if record.error is not None]
    if failed or len(records) != len(asked):
        what = failed[0].error if failed else f"{len(asked) - len(records)} requests are missing"
        raise KvplugError(f"The client could not be calibrated: {what}.")
    known = {session[0]: session[1][0][4]["fake"]["ttft_s"] for session in asked}
    first = np.array([abs((r.ttft_sent or 0.0) - known[r.session]) for r in records])
    gaps = np.array([gap for record in records for gap in record.gaps])
    cpu = [line["cpu"] for line in read_lines(folder / "samples") if line["kind"] == "client"]
    ttft = np.quantile(first, [0.5, 0.95, 1.0])
    gap = np.quantile(abs(gaps - GAP_S), [0.5, 0.95])
    return Calibration(
        streams, processes, len(records),
        ttft_p50=float(ttft[0]), ttft_p95=float(ttft[1]), ttft_max=float(ttft[2]),
        gap_p50=float(gap[0]), gap_p95=float(gap[1]), zero_gaps=float((gaps == 0).mean()),
        cpu=max(cpu, default=0.0), late_p50=told.get(LATE_P50, 0.0),
        late_max=told.get(LATE_MAX, 0.0),
    )  # fmt: skip


def as_json(calibration: Calibration) -> dict[str, Any]:
    """For ``kvplug load calibrate --json``."""
    return {**asdict(calibration), "is_believable": calibration.is_believable}
