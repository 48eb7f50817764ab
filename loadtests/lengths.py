"""How long documents are: a distribution of prompt tokens that a user names.

``fixed:32768``, ``uniform:4096-32768``, ``lognormal:8192,0.6,32768`` (median, spread of the
logarithm, longest). A bare number is fixed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from kvplug.errors import KvplugError
from kvplug.registry import Registry

SHORTEST = 128
"""Tokens: a shorter prompt has no room for a document."""
LONGEST = 1_048_576


@dataclass(frozen=True)
class Lengths:
    """A distribution of prompt lengths, in tokens."""

    text: str
    """As the user wrote it."""
    shortest: int
    longest: int
    median: float = 0.0
    """Of a lognormal distribution; 0 for an even one."""
    sigma: float = 0.0
    """Standard deviation of the logarithm."""

    def __post_init__(self) -> None:
        """Checks the ends.

        Raises:
            KvplugError: They are out of range.
        """
        if not SHORTEST <= self.shortest <= self.longest <= LONGEST:
            raise KvplugError(
                f"Lengths {self.text!r} must lie between {SHORTEST} and {LONGEST} tokens, the "
                f"shorter one first."
            )

    def draw(self, source: random.Random) -> int:
        """A length, in tokens."""
        if not self.median:
            return source.randint(self.shortest, self.longest)
        value = math.exp(source.normalvariate(math.log(self.median), self.sigma))
        return min(max(round(value), self.shortest), self.longest)


def _fixed(text: str, rest: str) -> Lengths:
    return Lengths(text, int(rest), int(rest))


def _uniform(text: str, rest: str) -> Lengths:
    low, _, high = rest.partition("-")
    return Lengths(text, int(low), int(high))


def _lognormal(text: str, rest: str) -> Lengths:
    median, sigma, longest = rest.split(",")
    if not SHORTEST <= float(median) <= int(longest) or not 0 < float(sigma) < 10:
        raise ValueError
    return Lengths(text, SHORTEST, int(longest), float(median), float(sigma))


DISTRIBUTIONS: Registry[Callable[[str, str], Lengths]] = Registry("distribution of lengths")
DISTRIBUTIONS.register("fixed")(_fixed)
DISTRIBUTIONS.register("uniform")(_uniform)
DISTRIBUTIONS.register("lognormal")(_lognormal)


def parse_lengths(text: str) -> Lengths:
    """The distribution that a user names.

    Raises:
        KvplugError: Unknown name, or parameters that are not of its form.
    """
    kind, _, rest = text.partition(":")
    if kind.strip().isdigit():
        kind, rest = "fixed", kind
    make = DISTRIBUTIONS.get(kind)
    try:
        return make(text, rest)
    except KvplugError:
        raise
    except ValueError:
        raise KvplugError(
            f"Lengths {text!r} must be like fixed:32768, uniform:4096-32768 or "
            f"lognormal:8192,0.6,32768 (median, spread, longest)."
        ) from None
