"""Tasks from files that a user has: LongBench's and InfiniteBench's JSON lines.

Nothing is downloaded. A record has a long ``context``, an ``input`` and its answers (``answers``,
or InfiniteBench's ``answer``); what it is scored by follows from the name of its dataset. Records
are drawn at random. A context that is too long loses its middle, as in LongBench's own runs.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvplug.errors import KvplugError
from kvplug.evals import text_metrics
from kvplug.evals.metrics import METRICS
from kvplug.evals.tasks import TASKS
from kvplug.evals.tasks.base import Example, Materials, Task

QUESTION = "Answer the question about the text in a few words."
SUMMARY = "Write a summary of the text."


class Kind(NamedTuple):
    """How a dataset is asked and scored."""

    metric: str
    asked: str
    """Said before the record's input."""
    max_tokens: int


KINDS = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa",
         "longbook_qa_eng"),
        Kind("f1", QUESTION, 64),
    ),
    **dict.fromkeys(
        ("gov_report", "qmsum", "multi_news", "longbook_sum_eng"), Kind("rouge_l", SUMMARY, 512)
    ),
    "samsum": Kind("rouge_l", "Summarise the last dialogue like the others.", 128),
    "trec": Kind("classification", "Name the type of the last question.", 64),
    "passage_retrieval_en": Kind("retrieval", "Which paragraph is this the summary of?", 32),
    "passage_count": Kind("retrieval", "How many different paragraphs are there?", 32),
    **dict.fromkeys(("lcc", "repobench-p"), Kind("similarity", "Write the next line of code.", 64)),
    **dict.fromkeys(("passkey", "number_string", "kv_retrieval"), Kind("holds", QUESTION, 64)),
    "math_find": Kind("retrieval", "Answer with a number.", 16),
    "longdialogue_qa_eng": Kind("holds", "Name who is missing.", 40),
}  # fmt: skip
"""Dataset -> kind. Those in Chinese need a word splitter and are left out."""

for _name in ("f1", "rouge_l", "classification", "retrieval", "similarity", "holds"):
    METRICS[_name] = text_metrics.best(getattr(text_metrics, _name))


@dataclass(frozen=True)
class Record:
    """One line of a file."""

    context: str
    asked: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


class FileTask(Task):
    """A file's records."""

    smallest = 64

    def __init__(self, name: str, kind: Kind, records: list[Record]) -> None:
        """Holds them."""
        self.name = name  # type: ignore[misc]
        self.source = "a file"  # type: ignore[misc]
        self.metric, self.max_tokens = kind.metric, kind.max_tokens  # type: ignore[misc]
        self.asked, self.records = kind.asked, records

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a word of the context."""
        record = draw.choice(self.records)
        words = record.context.split(" ")
        if len(words) > size:
            words = [*words[: size // 2], *words[len(words) - (size - size // 2) :]]
        question = " ".join(part for part in (self.asked, record.asked) if part)
        return Example(" ".join(words), question, "Answer:", record.answers, None, record.classes)


def add_file(path: Path) -> str:
    """Makes a task of a file.

    Returns:
        Its name, ``file:DATASET``.

    Raises:
        KvplugError: It cannot be read, is empty, or is of a dataset that is not known.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise KvplugError(f"{str(path)!r} is not a file of JSON lines: {error}.") from None
    if not found:
        raise KvplugError(f"{str(path)!r} has no records.")
    dataset = str(found[0].get("dataset") or path.stem).removesuffix("_e")
    if dataset not in KINDS:
        raise KvplugError(
            f"{str(path)!r} is of dataset {dataset!r}, which is none of {', '.join(sorted(KINDS))}."
        )
    name = f"file:{dataset}"
    TASKS.register(name)(FileTask(name, KINDS[dataset], [_record(path, r) for r in found]))
    return name


def _record(path: Path, raw: Any) -> Record:
    """One record.

    Raises:
        KvplugError: It lacks a field.
    """
    try:
        answers = raw["answers"] if "answers" in raw else raw["answer"]
        listed = [answers] if isinstance(answers, str | int) else list(answers)
        return Record(
            str(raw["context"]), str(raw["input"]), tuple(map(str, listed)),
            tuple(raw.get("all_classes") or ()),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise KvplugError(f"{str(path)!r} has a record without {error}.") from None
