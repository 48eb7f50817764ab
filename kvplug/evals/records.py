"""Answers as they come, in a file of JSON lines: settings first, then one answer a line.

A run that stops loses nothing; asked again, it goes on where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from kvplug.errors import KvplugError
from kvplug.evals.plan import Answer, Question, Settings


class Records:
    """The answers of a run, new ones and those of an earlier one.

    Args:
        path: Their file; None keeps them in memory only.
        settings: Of this run.

    Raises:
        KvplugError: The file has answers under other settings, or is not of this kind.
    """

    def __init__(self, path: Path | None, settings: Settings) -> None:
        """Reads what is there."""
        self._path = path
        self.answers: dict[tuple[str, Question], Answer] = {}
        if path is None:
            return
        if path.exists() and path.stat().st_size:
            known, answers = read(path)
            different = settings.difference(known)
            if different:
                raise KvplugError(
                    f"{str(path)!r} has answers under other settings ({'; '.join(different)}): "
                    f"name another file, or the same settings. Its answers are kept."
                )
            self.answers = {(answer.setup, answer.question): answer for answer in answers}
            _drop_torn_line(path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"settings": asdict(settings)}) + "\n")

    def add(self, answer: Answer) -> None:
        """Keeps an answer."""
        self.answers[answer.setup, answer.question] = answer
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(answer)) + "\n")

    def missing(self, setup: str, questions: list[Question]) -> list[Question]:
        """Those that the setup has not answered."""
        return [question for question in questions if (setup, question) not in self.answers]


def read(path: Path) -> tuple[Settings, list[Answer]]:
    """A file of answers; a last line that was cut off does not count.

    Raises:
        KvplugError: It is not one.
    """
    try:
        first, *lines = path.read_text().splitlines(keepends=True)
        settings = Settings(**json.loads(first)["settings"])
        return settings, [Answer(**json.loads(line)) for line in lines if line.endswith("\n")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KvplugError(f"{str(path)!r} is not a file of answers: {error}.") from None


def _drop_torn_line(path: Path) -> None:
    """Cuts off a last line without an end: what a killed run left."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
