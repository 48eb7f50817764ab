"""Makes the prompts of questions, and scores what is said to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from kvplug.evals.fit import Fitted, fit
from kvplug.evals.haystack import Noise, haystack
from kvplug.evals.metrics import METRICS
from kvplug.evals.plan import Answer, Question, Settings
from kvplug.evals.tasks import TASKS
from kvplug.evals.tasks.base import Materials
from kvplug.evals.wording import Wording


class Reply(NamedTuple):
    """What came back for a prompt."""

    output: str
    tokens: list[int]
    ttft_s: float
    decode_tok_s: float | None
    choices: list[list[list[float]]] = []  # noqa: RUF012 (a NamedTuple's default is not shared state)


class Prompts:
    """Prompts by question, made once.

    Args:
        settings: Of the run.
        count: Tokens of a text, specials included.
    """

    def __init__(self, settings: Settings, count: Callable[[str], int]) -> None:
        """Reads the haystack."""
        materials = Materials(Noise(), haystack(settings.haystack), Wording(settings.plain))

        @cache
        def made(question: Question) -> Fitted:
            task = TASKS.get(question.task)
            return fit(task, question.context, question.number, materials, count)

        self.of = made

    def answer(self, setup: str, question: Question, reply: Reply) -> Answer:
        """A setup's reply, scored."""
        example, tokens = self.of(question)
        score = METRICS[TASKS.get(question.task).metric](reply.output, example)
        return Answer(
            setup, *question, tokens, example.depth, reply.output, reply.tokens, score,
            reply.ttft_s, reply.decode_tok_s, reply.choices,
        )  # fmt: skip
