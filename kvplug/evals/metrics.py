"""Scores of answers, 0 to 1, by the metric that a task's paper uses."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from kvplug.evals.tasks.base import Example


def _plain(text: str) -> str:
    """Lower case, white space as single spaces."""
    return " ".join(text.lower().split())


def match_all(output: str, example: Example) -> float:
    """Share of the answers that the output holds: RULER's ``string_match_all``."""
    said = _plain(output)
    return sum(_plain(answer) in said for answer in example.answers) / len(example.answers)


def choice(output: str, example: Example) -> float:
    """Whether the first single letter A or B is the right one: SORT's accuracy."""
    found = re.search(r"\b([ab])\b", output.lower())
    return float(found is not None and found.group(1) == example.answers[0].lower())


def _mentioned(output: str, candidates: tuple[str, ...]) -> list[str]:
    """Candidates that the output names, in the order in which it first does."""
    said = _plain(output)
    places = {c: re.search(rf"(?<!\w){re.escape(_plain(c))}(?!\w)", said) for c in candidates}
    found = [(place.start(), c) for c, place in places.items() if place is not None]
    return [c for _, c in sorted(found)]


def set_f1(output: str, example: Example) -> float:
    """F1 of the candidates that the output names, against the answers.

    The benchmark's recall score, with equality in place of its judge.
    """
    named, right = set(_mentioned(output, example.candidates)), set(example.answers)
    hits = len(named & right)
    return 2 * hits / (len(named) + len(right))


def order(output: str, example: Example) -> float:
    """Kendall's tau of the answers that the output names, times the share that it names.

    Orders worse than chance count as 0; one answer alone is in order.
    """
    rank = {answer: i for i, answer in enumerate(example.answers)}
    named = [rank[c] for c in _mentioned(output, example.candidates) if c in rank]
    share = len(named) / len(rank)
    pairs = list(itertools.combinations(named, 2))
    if not pairs:
        return share
    tau = sum(1 if a < b else -1 for a, b in pairs) / len(pairs)
    return max(tau, 0.0) * share


METRICS: dict[str, Callable[[str, Example], float]] = {
    "all": match_all, "choice": choice, "set_f1": set_f1, "order": order,
}  # fmt: skip
"""Metric -> score of an output."""
