"""What is asked: sessions of one or more turns, made from seeds before a run begins."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kvplug.loadtests.lengths import Lengths


class Turn(NamedTuple):
    """One request."""

    messages: list[dict[str, str]]
    expected: str
    """Words that a right answer holds; empty: any answer will do."""
    kind: str
    """Requests of one kind are also reported by themselves."""
    context: int
    """Tokens of the prompt that were asked for; what the server counted is measured."""
    extra: dict[str, Any]
    """Fields that the body has besides the common ones."""


class Session(NamedTuple):
    """Requests of one user, each sent when the one before it was answered."""

    number: int
    turns: list[Turn]
    pauses: list[float]
    """Seconds between an answer and the next turn; one less than turns."""


@dataclass(frozen=True)
class Materials:
    """What workloads are made of."""

    tokenizer: PreTrainedTokenizerBase
    lengths: Lengths
    short: Lengths
    """Of the short requests of a mixed workload."""
    short_share: float = 0.5
    """Of requests that are short."""
    documents: int = 1
    """Different long prefixes that requests share."""
    turns: int = 4
    """Of a conversation."""
    pause_s: float = 1.0
    """Mean seconds that a user thinks between turns."""
    seed: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)
    """Documents that several sessions share."""

    def source(self, *what: object) -> random.Random:
        """Random numbers of their own for each purpose, the same in every process."""
        return random.Random(" ".join(map(str, (self.seed, *what))))


class Workload(Protocol):
    """Makes sessions."""

    name: str

    def session(self, number: int, materials: Materials) -> Session:
        """The session of that number, which depends on it and the materials alone."""
        ...


def sessions(workload: Workload, materials: Materials, first: int, count: int) -> Iterator[Session]:
    """Sessions ``first`` to ``first + count - 1``."""
    for number in range(first, first + count):
        yield workload.session(number, materials)


def needle_turn(materials: Materials, lengths: Lengths, number: int, kind: str) -> Turn:
    """A document of its own with one fact at a random place, and a question for it."""
    from kvplug.models.documents import needle_prompt

    draw = materials.source(kind, number)
    tokens = lengths.draw(draw)
    prompt = needle_prompt(materials.tokenizer, tokens, draw.random(), draw.randrange(2**31))
    return Turn(prompt.messages(), prompt.expected, kind, tokens, {})
