"""What a task is: a generator of prompts with known answers, of any length, from a seed."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from kvplug.evals.haystack import Haystack
from kvplug.evals.wording import Wording


@dataclass(frozen=True)
class Example:
    """One prompt and what a right answer holds."""

    document: str
    """The long text."""
    question: str
    """What is asked about it, and how."""
    opening: str
    """The beginning of the answer, written into the prompt: base models go on from it."""
    answers: tuple[str, ...]
    """What the answer should hold; a metric says how many of them, and in which order."""
    depth: float | None = None
    """Where in the document the evidence stands, 0 to 1; None where it is in many places."""
    candidates: tuple[str, ...] = ()
    """Everything that could be an answer, for metrics that punish wrong ones."""

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return "\n".join(part for part in (self.document, self.question, self.opening) if part)


@dataclass(frozen=True)
class Materials:
    """What tasks make prompts of."""

    noise: Haystack
    """The filler of tasks that define it as noise."""
    text: Haystack
    """The filler of tasks that want text."""
    wording: Wording
    """Keys and values."""


class Task(ABC):
    """A generator. One instance per name; it holds no state."""

    name: ClassVar[str]
    """What users call it."""
    source: ClassVar[str]
    """The paper or benchmark that defines it, and where this differs."""
    metric: ClassVar[str] = "all"
    """Name in :data:`kvplug.evals.metrics.METRICS`."""
    chance: ClassVar[float] = 0.0
    """Score of an answer that knows the format and has not read the document."""
    max_tokens: ClassVar[int] = 64
    """Tokens that an answer may take."""
    smallest: ClassVar[int] = 0
    """Least size that :meth:`make` takes."""

    @abstractmethod
    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """One example.

        Args:
            draw: Every choice comes from it: same draw, same example.
            size: Units of what makes the document longer (sentences, pairs, chapters); tokens grow
                about in proportion.
            materials: See there.
        """


def scattered(draw: random.Random, filler: list[str], hidden: list[str]) -> tuple[str, list[float]]:
    """Puts sentences at random places of a text, in their order.

    Returns:
        The text, and the depth of each, 0 to 1.
    """
    places = sorted(draw.randint(0, len(filler)) for _ in hidden)
    parts: list[str] = []
    for start, stop, sentence in zip([0, *places], places, hidden, strict=False):
        parts += [*filler[start:stop], sentence]
    parts += filler[places[-1] :] if places else filler
    return " ".join(parts), [place / max(len(filler), 1) for place in places]
