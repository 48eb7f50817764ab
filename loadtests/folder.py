"""Where a load test is kept: what it is, its requests as they end, what was sampled beside them.

A run that dies has everything but the page, which ``kvplug load --from FOLDER`` draws then.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvplug.errors import KvplugError
from kvplug.loadtests.calibrate import Calibration
from kvplug.loadtests.records import Appender, Record, read_lines, read_records
from kvplug.loadtests.settings import Settings
from kvplug.loadtests.slo import Slo

VERSION = 1
RUN, REQUESTS, SAMPLES = "run.json", "requests.jsonl", "samples.jsonl"


@dataclass
class Run:
    """What a load test is, apart from its requests."""

    settings: Settings
    slo: Slo
    setups: list[str]
    """Labels, in the order in which they are asked; the first is what others are compared with."""
    environment: dict[str, Any]
    """Machine, versions, commands."""
    calibration: Calibration | None = None
    troubles: dict[str, str] = field(default_factory=dict)
    """Label -> why it was not asked everything."""
    is_over: bool = False

    @property
    def is_partial(self) -> bool:
        """Whether something is missing."""
        return bool(self.troubles) or not self.is_over


class Folder:
    """A load test's folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        """Touches nothing."""
        self.path = path

    def create(self, run: Run) -> None:
        """Makes the folder.

        Raises:
            KvplugError: It holds a load test, or cannot be written.
        """
        if (self.path / RUN).exists():
            raise KvplugError(f"{str(self.path)!r} holds a load test already: name another folder.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.save(run)
        except OSError as error:
            raise KvplugError(f"{str(self.path)!r} cannot be written: {error.strerror}.") from None

    def save(self, run: Run) -> None:
        """Writes what the run is, whole or not at all."""
        scratch = self.path / f".{RUN}"
        scratch.write_text(json.dumps({"version": VERSION, **_finite(asdict(run))}, indent=1))
        os.replace(scratch, self.path / RUN)

    def samples(self) -> Appender:
        """Takes samples."""
        return Appender(self.path / SAMPLES)

    @property
    def requests_path(self) -> Path:
        """File of the requests."""
        return self.path / REQUESTS

    @property
    def samples_path(self) -> Path:
        """File of the samples."""
        return self.path / SAMPLES

    def read(self) -> tuple[Run, list[Record], list[dict[str, Any]]]:
        """What is there.

        Raises:
            KvplugError: It is not a load test of this version.
        """
        try:
            told = json.loads((self.path / RUN).read_text())
            if told.pop("version") != VERSION:
                raise KeyError("version")
            settings = told.pop("settings")
            settings["levels"] = tuple(settings["levels"])
            slo = {name: value for name, value in told.pop("slo").items() if value is not None}
            floor = told.pop("calibration")
            run = Run(
                Settings(**settings), Slo(**slo),
                calibration=None if floor is None else Calibration(**floor), **told,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KvplugError(
                f"{str(self.path)!r} is not a load test of this version: {error}."
            ) from None
        return run, read_records(self.requests_path), read_lines(self.samples_path)


def _finite(told: dict[str, Any]) -> dict[str, Any]:
    """With None for limits that are infinite, which JSON cannot say."""
    slo = {name: None if value == float("inf") else value for name, value in told["slo"].items()}
    return {**told, "slo": slo}
