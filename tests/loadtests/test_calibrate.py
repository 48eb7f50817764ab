"""Calibration finds the delays that the fake server was told, each of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.calibrate import FIRST_S, LIMIT_S, as_json, calibrate, sessions
from tests.loadtests.made_up import EXACT


def test_delays_are_found_by_two_processes() -> None:
    said: list[str] = []
    found = calibrate(streams=4, processes=2, seed=1, say=said.append)
    assert (found.streams, found.processes, found.requests) == (4, 2, 16)
    # Delays differ by up to 100 ms, so a client that reads none of them is off by as much. The
    # bounds are for a machine that does other things too; `kvplug load calibrate` states the floor.
    assert 0 < found.ttft_p50 < 0.05
    assert found.ttft_p50 <= found.ttft_p95 <= found.ttft_max
    assert found.gap_p50 < 0.015  # of gaps of 20 ms
    assert 0 <= found.zero_gaps < 0.5
    assert 0 < found.cpu < 1.5
    assert 0 < found.late_p50 <= found.late_max
    assert "4 streams" in said[0]


def test_delays_come_from_the_seed() -> None:
    delays = [session[1][0][4]["fake"]["ttft_s"] for session in sessions(50, 1)]
    assert delays == [session[1][0][4]["fake"]["ttft_s"] for session in sessions(50, 1)]
    assert len(set(delays)) == 50
    assert FIRST_S[0] <= min(delays) < max(delays) <= FIRST_S[1]


def test_the_limit() -> None:
    assert replace(EXACT, ttft_p95=LIMIT_S * 0.99).is_believable
    assert not replace(EXACT, ttft_p95=LIMIT_S).is_believable
    assert as_json(EXACT)["is_believable"] is True


@pytest.mark.parametrize(("streams", "processes"), [(0, 1), (1, 2), (5, 0), (1001, 1)])
def test_nonsense_is_refused(streams: int, processes: int) -> None:
    with pytest.raises(KvplugError, match="1 to 1000 streams"):
        calibrate(streams, processes, 0, lambda _: None)
