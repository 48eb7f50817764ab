"""Scores of free text, as LongBench defines them (Bai et al. 2024, arXiv 2308.14508).

Every score is the best over the answers that a record accepts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

from kvplug.evals.tasks.base import Example

Metric = Callable[[str, str, tuple[str, ...]], float]
"""Output, one answer, all classes -> score."""


def words(text: str) -> list[str]:
    """Lower-case words without articles and punctuation, as SQuAD compares them."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def f1(output: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """Harmonic mean of precision and recall over words."""
    said, wanted = Counter(words(output)), Counter(words(answer))
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total()) if common else 0.0


def rouge_l(output: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004)."""
    said, wanted = output.lower().split(), answer.lower().split()
    lengths = [0] * (len(wanted) + 1)
    for word in said:
        diagonal = 0
        for j, other in enumerate(wanted):
            above = lengths[j + 1]
            lengths[j + 1] = diagonal + 1 if word == other else max(above, lengths[j])
            diagonal = above
    longest = lengths[-1]
    return 2 * longest / (len(said) + len(wanted)) if longest else 0.0


def classification(output: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """One over the classes that the output names, if the right one is among them.

    Names that are a part of the answer's do not count as others.
    """
    named = [name for name in classes if name in output]
    named = [name for name in named if name not in answer or name == answer]
    return 1 / len(named) if answer in named else 0.0


def retrieval(output: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """Share of the numbers in the output that are the answer's."""
    wanted, said = re.search(r"\d+", answer), re.findall(r"\d+", output)
    return said.count(wanted.group()) / len(said) if wanted and said else 0.0


def similarity(output: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """Edit similarity of the first line of code: one less edits over the longer length."""
    lines = [line for line in output.lstrip("\n").splitlines() if not re.match(r"\s*[`#/]", line)]
    said = lines[0] if lines else ""
    before = list(range(len(answer) + 1))
    for i, character in enumerate(said, 1):
        row = [i]
        for j, other in enumerate(answer, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (character != other)))
        before = row
    return 1 - before[-1] / max(len(said), len(answer), 1)


def holds(output: str, answer: str, classes: tuple[str, ...] = ()) -> float:
    """Whether the output holds the answer."""
    return float(" ".join(answer.lower().split()) in " ".join(output.lower().split()))


def best(metric: Metric) -> Callable[[str, Example], float]:
    """The metric's best score over the answers of an example; its candidates are the classes."""

    def score(output: str, example: Example) -> float:
        return max(metric(output, answer, example.candidates) for answer in example.answers)

    return score
