"""Common and frequent words of RULER (Hsieh et al. 2024, arXiv 2404.06654)."""

from __future__ import annotations

import itertools
import random

from kvplug.evals.tasks.base import Example, Materials, Task
from kvplug.evals.tasks.needles import RULER
from kvplug.models.words import word_sections

COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
ALPHA = 2.0
"""Of the zeta distribution of coded words: the n-th most frequent has share n^-2 / zeta(2)."""
FREQUENT = 3
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class CommonWords(Task):
    """``cwe``: ten words stand 30 times in a list, all others 3 times."""

    name = "cwe"
    source = f"{RULER}, cwe (without its example; words of the bundled list)"
    max_tokens = 120

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a rare word, of which there are as many as words."""
        words = word_sections()
        pool = [*words["nouns"], *words["adjectives"]]
        pairs = (f"{a} {b}" for a, b in itertools.product(pool, pool))
        draw.shuffle(pool)
        common, rare = pool[:COMMON], pool[COMMON:]
        while len(rare) < size:  # beyond the list, two words are one
            rare.append(next(pairs).replace(" ", ""))
        listed = common * COMMON_TIMES + rare[:size] * RARE_TIMES
        draw.shuffle(listed)
        text = " ".join(f"{i + 1}. {word}" for i, word in enumerate(listed))
        return Example(
            f"Some words of this numbered list stand in it more often than the others.\n{text}",
            f"What are the {COMMON} most common words in the list?",
            f"The {COMMON} most common words in the list are",
            tuple(common),
        )


class FrequentWords(Task):
    """``fwe``: coded words by a zeta distribution; the three most frequent are asked for."""

    name = "fwe"
    source = f"{RULER}, fwe"
    max_tokens = 50
    smallest = 200
    """So that the first three are clearly ahead."""

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a word."""
        kinds = max(size // 50, FREQUENT + 1)
        codes: dict[str, None] = {}
        while len(codes) < kinds:
            codes["".join(draw.choices(LETTERS, k=6))] = None
        names = list(codes)
        weights = [n**-ALPHA for n in range(1, kinds + 1)]
        total = sum(weights)
        # Exact shares, rounded: the order of the first three never depends on luck.
        counts = [max(round(size * weight / total), 1) for weight in weights]
        listed = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        listed += ["..."] * max(size - len(listed), 0)
        draw.shuffle(listed)
        return Example(
            f"Read the coded text and count the coded words.\n{' '.join(listed)}",
            f"What are the {FREQUENT} most frequent words of the coded text? Dots are no words.",
            f"The {FREQUENT} most frequent words are",
            tuple(names[:FREQUENT]),
        )
