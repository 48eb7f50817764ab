"""Runs the lab on several models, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kvplug.errors import KvplugError
from kvplug.evals.endpoint import Endpoint
from kvplug.evals.local import LocalModel
from kvplug.evals.plan import Answer, Job, Settings, Setup
from kvplug.evals.records import Records
from kvplug.evals.run import Model, run
from kvplug.evals.summary import Row, summarise
from kvplug.machine import num_threads, processor, versions

BUNDLED = ("recall", "trained")
"""What a user means by ``bundled``: a constructed model and a trained one."""


class Result(NamedTuple):
    """What came of one model."""

    settings: Settings
    rows: list[Row]
    answers: list[Answer]
    """Those that this run asked for."""
    seconds: float
    """That it took now; answers of an earlier run took none."""


@dataclass(frozen=True)
class Lab:
    """What every model is asked, and how."""

    setups: list[Setup]
    """Of checkpoints; an endpoint is the one setup that it is."""
    tasks: list[str]
    contexts: list[int]
    examples: int
    haystack: str
    plain: bool | None
    """None: for bundled models."""
    page: int
    chunk: int
    eager: bool
    selector: bool
    label: str = "dense"
    """What an endpoint is called."""
    timeout_s: float = 600.0
    key: str = field(default="", repr=False)

    def run(self, model: str, answers: Path | None, say: Callable[[str], None]) -> Result:
        """Asks one model.

        Args:
            model: A checkpoint, a bundled model, or an endpoint's URL.
            answers: Where its answers are kept.
            say: Told what happens.

        Raises:
            KvplugError: A setup or task is refused, answers were kept under other settings, or the
                model failed; what was answered before is kept.
        """
        start = time.perf_counter()
        is_remote = model.startswith(("http://", "https://"))
        settings = Settings(
            model, self.haystack, model in BUNDLED if self.plain is None else self.plain,
            self.page, self.chunk, self.eager, self.selector,
            "" if is_remote else processor(), 0 if is_remote else num_threads(),
            {} if is_remote else versions(),
        )  # fmt: skip
        setups = [Setup(self.label, self.label)] if is_remote else self.setups
        if self.selector:
            setups = [s for s in setups if s.budget is not None and not s.is_peer]
        if not setups:
            raise KvplugError("--selector measures recipes on a checkpoint; none is named.")
        job = Job(settings, setups, self.tasks, self.contexts, self.examples)
        records = Records(answers, settings)
        answering: Model = (
            Endpoint(settings, self.timeout_s, self.key) if is_remote else LocalModel(settings)
        )
        run(job, answering, records, say)
        asked = set(job.questions())
        given = [answer for answer in records.answers.values() if answer.question in asked]
        rows = summarise(given, setups, self.page)
        return Result(settings, rows, given, time.perf_counter() - start)


def models_of(names: list[str]) -> list[str]:
    """Models by name, ``bundled`` for those that kvplug brings."""
    found = [name for given in names for name in (BUNDLED if given == "bundled" else (given,))]
    return list(dict.fromkeys(found))


def answers_file(path: Path | None, model: str, models: list[str]) -> Path | None:
    """A file of answers for each of several models: its name goes before the suffix."""
    if path is None or len(models) == 1:
        return path
    place = models.index(model)
    return path.with_name(f"{path.stem}.{file_name(model) or place}{path.suffix}")


def file_name(model: str) -> str:
    """What a model's files are called."""
    last = model.rstrip("/").rsplit("/", 1)[-1]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in last)
