"""What answers say of setups: accuracy, what is left of dense accuracy, speed-up, differences."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from kvplug.evals.attended import attended_tokens
from kvplug.evals.bootstrap import Interval, mean, ratio
from kvplug.evals.plan import STOCK, Answer, Question, Setup
from kvplug.evals.selector import Choice

ALL = "all tasks"


@dataclass(frozen=True)
class Row:
    """One setup on one task at one length, or on all tasks together."""

    setup: str
    task: str
    context: int
    examples: int
    accuracy: Interval
    kept: Interval | None
    """Accuracy over dense accuracy on the same examples; None where dense scored nothing."""
    attended: float
    """Share of the context that a query of the answer attends to."""
    ttft_ratio: float | None
    """Median of dense seconds to the first token over the setup's, example by example; None for a
    peer, which has another engine."""
    decode_ratio: float | None
    """Median of decode speeds over dense's."""
    first_difference: float | None
    """Median place of the first token that differs from dense's, in examples in which one does."""
    same_output: float | None
    """Share of examples whose output is dense's, token by token."""
    selection: Choice | None
    """Mean over examples, layers and KV heads, where selections were measured."""


def first_difference(tokens: list[int], base: list[int]) -> int | None:
    """Place of the first token in which two outputs differ; None if they are the same."""
    for place, (a, b) in enumerate(zip(tokens, base, strict=False)):
        if a != b:
            return place
    return None if len(tokens) == len(base) else min(len(tokens), len(base))


def summarise(answers: list[Answer], setups: list[Setup], page: int) -> list[Row]:
    """One row per setup, task and length, then one per setup and length over all tasks.

    Only questions that dense answered too are compared with it.
    """
    by_setup: dict[str, dict[Question, Answer]] = {}
    for answer in answers:
        by_setup.setdefault(answer.setup, {})[answer.question] = answer
    base = by_setup.get(STOCK, {})
    rows = []
    for setup in setups:
        mine = by_setup.get(setup.label, {})
        cells = {(question.context, question.task) for question in mine}
        cells |= {(context, ALL) for context, _ in cells}
        for context, task in sorted(cells, key=lambda cell: (cell[0], cell[1] == ALL, cell[1])):
            asked = [q for q in mine if q.context == context and task in (q.task, ALL)]
            rows.append(_row(setup, task, context, [mine[q] for q in asked], base, page))
    return rows


def _row(
    setup: Setup, task: str, context: int, answers: list[Answer], base: dict[Question, Answer],
    page: int,
) -> Row:  # fmt: skip
    pairs = [(a, base[a.question]) for a in answers if a.question in base]
    places = [first_difference(a.tokens, b.tokens) for a, b in pairs if a.tokens and b.tokens]
    differing = [place for place in places if place is not None]
    prompt = round(statistics.fmean(answer.prompt_tokens for answer in answers))
    timed = [] if setup.is_peer else pairs
    rates = [a.decode_tok_s / b.decode_tok_s for a, b in pairs if a.decode_tok_s and b.decode_tok_s]
    return Row(
        setup.label, task, context, len(answers), mean([a.score for a in answers]),
        ratio([a.score for a, _ in pairs], [b.score for _, b in pairs]) if pairs else None,
        attended_tokens(setup, page, prompt) / prompt,
        statistics.median([b.ttft_s / a.ttft_s for a, b in timed]) if timed else None,
        statistics.median(rates) if rates else None,
        statistics.median(differing) if differing else None,
        places.count(None) / len(places) if places else None, selection(answers),
    )  # fmt: skip


def selection(answers: list[Answer]) -> Choice | None:
    """What heads selected, on the mean; None where that was not measured."""
    heads = [head for answer in answers for layer in answer.choices for head in layer]
    if not heads:
        return None
    return Choice(*(statistics.fmean(column) for column in zip(*heads, strict=True)))
