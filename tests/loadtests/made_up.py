"""Requests, settings and runs made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvplug.loadtests.calibrate import Calibration
from kvplug.loadtests.folder import Run
from kvplug.loadtests.records import Record
from kvplug.loadtests.settings import Settings
from kvplug.loadtests.slo import Slo

SETTINGS = Settings(
    loop="closed", process="poisson", shape="constant", levels=(2.0,), seconds=5.0, requests=6,
    workload="needles", lengths="fixed:300", short_lengths="fixed:200", short_share=0.5,
    documents=2, turns=2, pause_s=0.0, output_tokens=16, ignore_eos=False, seed=3, processes=1,
    timeout_s=20.0, most_in_flight=64, most_s=60.0, warmups=0, scrape_s=0.2,
)  # fmt: skip
EXACT = Calibration(20, 1, 80, 0.001, 0.002, 0.003, 0.0, 0.001, 0.0, 0.1, 0.0, 0.001)


def settings(**changed: Any) -> Settings:
    return replace(SETTINGS, **changed)


def record(**changed: Any) -> Record:
    """A request due at 0, sent at once, with text at 1, 1.5 and 2 seconds."""
    whole = Record(
        setup="a", phase=0, session=0, turn=0, kind="needle", process=0, intended=0.0, free=0.0,
        sent=0.0, first=1.0, end=2.0, gaps=[0.5, 0.5], prompt_tokens=100, completion_tokens=3,
        cached_tokens=None, finish="stop", text="blue harbor six.", expected="blue harbor six.",
        right=True, error=None, detail="",
    )  # fmt: skip
    return replace(whole, **changed)


def failed(**changed: Any) -> Record:
    return record(**{
        "first": None, "gaps": [], "text": "", "right": None, "error": "http 503",
        "prompt_tokens": None, "completion_tokens": None, **changed,
    })  # fmt: skip


def run_of(*setups: str, **changed: Any) -> Run:
    whole = Run(SETTINGS, Slo(ttft=2.0), list(setups), {"processor": "a <chip>"}, EXACT, {}, True)
    return replace(whole, **changed)
