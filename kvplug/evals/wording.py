"""Keys and values of recall tasks: words, numbers or UUIDs, as RULER names them.

A tokenizer that spells numbers digit by digit makes other tasks of them: digits of different
numbers agree by chance. ``plain`` wording says everything in words, for models with few tokens.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from kvplug.models.words import word_sections

DIGITS = 7
"""Of a number, as in RULER."""


def _pair(draw: random.Random) -> str:
    words = word_sections()
    return f"{draw.choice(words['adjectives'])}-{draw.choice(words['nouns'])}"


def _plain_pair(draw: random.Random) -> str:
    return _pair(draw).replace("-", " ")


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _phrase(draw: random.Random) -> str:
    words = word_sections()
    return " ".join(draw.choice(words[section]) for section in ("colors", "places", "numbers"))


KINDS: dict[str, Callable[[random.Random], str]] = {
    "words": _pair, "numbers": _number, "uuids": _uuid,
}  # fmt: skip
PLAIN: dict[str, Callable[[random.Random], str]] = {
    "words": _plain_pair, "numbers": _phrase, "uuids": _plain_pair,
}  # fmt: skip
"""The same kinds, said in words of one token each. Keys are two words with nothing between them, so
that a model which compares few tokens can tell thousands apart."""


@dataclass(frozen=True)
class Wording:
    """How keys and values are written."""

    plain: bool = False
    """In words only."""

    def some(self, draw: random.Random, kind: str, count: int) -> list[str]:
        """``count`` keys or values of a kind, all different.

        Args:
            draw: Where they come from.
            kind: ``words``, ``numbers`` or ``uuids``.
            count: How many.
        """
        make = (PLAIN if self.plain else KINDS)[kind]
        found: dict[str, None] = {}
        while len(found) < count:
            found[make(draw)] = None
        return list(found)

    def one(self, draw: random.Random, kind: str) -> str:
        """One of a kind."""
        return self.some(draw, kind, 1)[0]

    def kind(self, kind: str) -> str:
        """What the kind is called in a text: plain values are no numbers."""
        return "words" if self.plain else kind
