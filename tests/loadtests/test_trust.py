"""The client is believed only when every check holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvplug.loadtests.records import Record
from kvplug.loadtests.trust import Check, checks
from tests.loadtests.made_up import EXACT, record


def beat(**changed: Any) -> dict[str, Any]:
    return {"kind": "client", "setup": "a", "cpu": 0.2, "late": [0.001] * 99, **changed}


def bad(records: list[Record], samples: list[dict[str, Any]], planned: int = 0) -> list[str]:
    found = checks(EXACT, ["a"], records, samples, planned)
    return [check.name for check in found if not check.is_fine]


def test_a_good_client() -> None:
    assert bad([record()], [beat()], planned=1) == []


def test_the_floor_comes_first() -> None:
    found = checks(replace(EXACT, ttft_p95=0.0051), ["a"], [record()], [beat()], 0)
    assert not found[0].is_fine
    assert "20 streams" in found[0].name
    assert (found[0].found, found[0].limit) == ("5.10 ms", "below 5.00 ms")
    assert checks(None, [], [], [], 0) == [Check("", "calibration", "none", "is needed", False)]


@pytest.mark.parametrize(
    ("records", "samples", "planned", "name"),
    [
        ([record(sent=0.02)], [beat()], 0, "sent behind schedule, 99%"),
        ([record()], [beat(late=[0.5] * 2 + [0.0] * 98)], 0, "event loop late, 99%"),
        ([record()], [beat(cpu=0.9)], 0, "CPU of a client process, 95% of its seconds"),
        ([record(free=0.5, sent=0.5)], [beat()], 0, "held back at the limit in flight"),
        ([record()], [beat()], 2, "sessions sent of those due"),
    ],
)
def test_each_way_to_be_bad(
    records: list[Record], samples: list[dict[str, Any]], planned: int, name: str
) -> None:
    assert bad(records, samples, planned) == [name]


def test_other_programs_take_little() -> None:
    def machine(share: float) -> dict[str, Any]:
        return {"kind": "machine", "setup": "a", "phase": 0, "others": share}

    assert bad([record()], [beat(), machine(0.05)]) == []
    assert bad([record()], [beat(), machine(0.01), machine(0.051)]) == [
        "CPU that other programs took"
    ]


def test_one_late_request_of_a_hundred_is_forgiven() -> None:
    assert bad([record(sent=1.0)] + [record()] * 99, [beat()]) == []
    assert bad([record(sent=1.0)] * 2 + [record()] * 98, [beat()]) != []


def test_lateness_is_measured_against_what_it_hides() -> None:
    """30 ms are nothing beside a first token after 4 s."""
    assert bad([record(sent=0.03, first=4.03)], [beat()]) == []
    assert bad([record(sent=0.03, first=2.03)], [beat()]) != []


def test_only_a_servers_own_samples_count() -> None:
    assert (
        bad([record()], [beat(), beat(setup="b", cpu=1.0), {"kind": "server", "setup": "a"}]) == []
    )


def test_later_turns_are_no_sessions() -> None:
    assert bad([record(turn=0), record(turn=1)], [beat()], planned=1) == []
