"""Sequence order recall (Pink et al. 2024, arXiv 2410.08133): which of two segments came first?"""

from __future__ import annotations

import random

from kvplug.evals.tasks.base import Example, Materials, Task

WORDS = 20
"""Least words of a segment, the shortest that the paper uses."""


class SequenceOrder(Task):
    """``sort``: an excerpt, then two segments of it, in either order."""

    name = "sort"
    source = "SORT (Pink et al. 2024, arXiv 2410.08133), over local text"
    metric = "choice"
    chance = 0.5
    max_tokens = 4
    smallest = 16

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a sentence."""
        sentences = materials.text.sentences(draw, size)
        middle = draw.randrange(size // 4, 3 * size // 4)
        early = self.segment(sentences, draw.randrange(middle))
        late = self.segment(sentences, draw.randrange(middle, size))
        answer = draw.choice("AB")
        first, second = (early, late) if answer == "A" else (late, early)
        return Example(
            " ".join(sentences),
            f"Two segments of the text:\nA: {first}\nB: {second}\n"
            "Which of them came first in the text, A or B?",
            "The segment that came first is",
            (answer,),
        )

    def segment(self, sentences: list[str], start: int) -> str:
        """Sentences from ``start`` on, 20 words or to the end of the text."""
        words: list[str] = []
        for sentence in sentences[start:]:
            words += sentence.split()
            if len(words) >= WORDS:
                break
        return " ".join(words)
