"""What the lab is asked to do: questions, and setups that all of them are put to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

STOCK = "dense"
"""Label of stock vLLM, without kvplug."""


class Question(NamedTuple):
    """One example of a task, the same for every setup."""

    task: str
    context: int
    """Tokens of prompt and answer, at most."""
    number: int
    """Which example; its seed."""


@dataclass(frozen=True)
class Setup:
    """What answers."""

    label: str
    policy: str
    """A recipe, or STOCK."""
    budget: int | None = None
    """Far tokens per window and KV head; None for STOCK and endpoints."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of kvplug's."""
    is_peer: bool = False
    """``policy`` is a method of kvpress's instead, which prunes the cache."""


@dataclass(frozen=True)
class Answer:
    """What a setup said to a question."""

    setup: str
    """Its label."""
    task: str
    context: int
    number: int
    prompt_tokens: int
    depth: float | None
    output: str
    tokens: list[int]
    """Ids of the output; empty where an endpoint does not say them."""
    score: float
    """By the task's metric, 0 to 1."""
    ttft_s: float
    """Seconds to the first token; one request at a time."""
    decode_tok_s: float | None
    """Tokens per second behind the first; None for an answer of one token."""
    choices: list[list[list[float]]] = field(default_factory=list)
    """Layer -> KV head -> :class:`kvplug.evals.selector.Choice`, where selections are measured."""

    @property
    def question(self) -> Question:
        """What was asked."""
        return Question(self.task, self.context, self.number)


@dataclass(frozen=True)
class Settings:
    """What makes answers comparable: a resumed run must have the same."""

    model: str
    """A path, a bundled model's name, or an endpoint's URL."""
    haystack: str
    plain: bool
    """Keys and values in words only; see :mod:`kvplug.evals.wording`."""
    page: int
    chunk: int
    eager: bool
    """Without vLLM's compiler."""
    selector: bool
    """Selections are measured, and so times say nothing."""
    processor: str
    threads: int
    versions: dict[str, str]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)

    def difference(self, other: Settings) -> list[str]:
        """What differs, in words."""
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{key} {theirs[key]!r} -> {mine[key]!r}" for key in mine if mine[key] != theirs[key]
        ]


@dataclass(frozen=True)
class Job:
    """Everything to be asked in one run."""

    settings: Settings
    setups: list[Setup]
    tasks: list[str]
    contexts: list[int]
    examples: int
    """Questions per task and context."""

    def questions(self) -> list[Question]:
        """All of them, those of one length together."""
        return [
            Question(task, context, number)
            for context in self.contexts
            for task in self.tasks
            for number in range(self.examples)
        ]
