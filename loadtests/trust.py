"""Whether the client's numbers can be believed: the first thing that a report says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvplug.loadtests.calibrate import LIMIT_S, Calibration
from kvplug.loadtests.records import Record

LATE_S = 0.010
LATE_SHARE = 0.01
"""A client may be late by the larger of LATE_S and this share of the median first token."""
OTHERS = 0.05
"""Share of a machine's cores that other programs may take while a server is measured on it."""
CPU = 0.8
"""Share of a core that a client process may take; beyond it, its own queue is measured."""


@dataclass(frozen=True)
class Check:
    """One reason to believe, or not."""

    setup: str
    """Empty: it is about the client alone."""
    name: str
    found: str
    limit: str
    """Empty: there is none, it is only told."""
    is_fine: bool


def checks(
    calibration: Calibration | None, setups: Sequence[str], records: Sequence[Record],
    samples: Sequence[Mapping[str, Any]], planned: int,
) -> list[Check]:  # fmt: skip
    """Every check of a run.

    Args:
        calibration: None: it was not reached.
        setups: Labels.
        records: Of all of them.
        samples: Of all client processes.
        planned: Sessions that each should be asked in an open loop; 0: a closed loop.
    """
    found = list(_floor(calibration))
    for setup in setups:
        mine = [record for record in records if record.setup == setup]
        if mine:
            beside = [sample for sample in samples if sample["setup"] == setup]
            beats = [sample for sample in beside if sample["kind"] == "client"]
            found += _of_setup(setup, mine, beats, planned)
            found += _machine(setup, [s["others"] for s in beside if s["kind"] == "machine"])
    return found


def _floor(calibration: Calibration | None) -> Iterator[Check]:
    """What the client adds."""
    if calibration is None:
        yield Check("", "calibration", "none", "is needed", False)
        return
    streams = f"{calibration.streams} streams of known delays"
    yield Check(
        "", f"error of first tokens, 95% of {streams}", _ms(calibration.ttft_p95),
        f"below {_ms(LIMIT_S)}", calibration.is_believable,
    )  # fmt: skip
    told = {
        "error of first tokens, median": _ms(calibration.ttft_p50),
        "error of first tokens, worst": _ms(calibration.ttft_max),
        "error of single gaps, 95%": _ms(calibration.gap_p95),
        "gaps of nothing, which were sent apart": f"{calibration.zero_gaps:.1%}",
        "of these errors, the fake server's own lateness, median": _ms(calibration.late_p50),
    }
    yield from (Check("", name, value, "", True) for name, value in told.items())


def _of_setup(
    setup: str, records: Sequence[Record], beats: Sequence[Mapping[str, Any]], planned: int
) -> Iterator[Check]:
    """How the client did while it asked one server."""
    firsts = [record.ttft_sent for record in records if record.ttft_sent is not None]
    allowed = max(LATE_S, LATE_SHARE * float(np.median(firsts)) if firsts else 0.0)
    lags = [record.lag for record in records]
    late = [lateness for beat in beats for lateness in beat["late"]]
    busy = [float(beat["cpu"]) for beat in beats]
    for name, values in (("sent behind schedule", lags), ("event loop late", late)):
        worst = _p99(values)
        yield Check(
            setup, f"{name}, 99%", f"{_ms(worst)} (worst {_ms(max(values, default=0.0))})",
            f"at most {_ms(allowed)}", worst <= allowed,
        )  # fmt: skip
    most = float(np.quantile(busy, 0.95)) if busy else 0.0
    yield Check(
        setup, "CPU of a client process, 95% of its seconds", f"{most:.0%}", f"at most {CPU:.0%}",
        most <= CPU,
    )  # fmt: skip
    held = sum(record.free > record.intended for record in records)
    yield Check(setup, "held back at the limit in flight", f"{held} requests", "none", held == 0)
    if planned:
        sent = sum(record.turn == 0 for record in records)
        yield Check(setup, "sessions sent of those due", f"{sent} of {planned}", "all",
                    sent == planned)  # fmt: skip


def _machine(setup: str, others: Sequence[float]) -> Iterator[Check]:
    """What other programs took from a server that was started here, in its worst phase."""
    if others:
        yield Check(
            setup, "CPU that other programs took", f"{max(others):.1%}", f"at most {OTHERS:.0%}",
            max(others) <= OTHERS,
        )  # fmt: skip


def _p99(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.99, method="inverted_cdf")) if values else 0.0


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"
