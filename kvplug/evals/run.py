"""Puts every question to every setup, and keeps what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from kvplug.errors import KvplugError
from kvplug.evals.local import groups
from kvplug.evals.plan import STOCK, Job, Question, Setup
from kvplug.evals.prompts import Prompts, Reply
from kvplug.evals.records import Records


class Model(Protocol):
    """What answers: a checkpoint or an endpoint."""

    prompts: Prompts

    def check(self, setups: list[Setup]) -> None:
        """Refuses setups that would not start."""

    def replies(
        self, setups: list[Setup], asked: list[tuple[Setup, Question]]
    ) -> Iterator[tuple[Setup, Question, Reply]]:
        """Puts questions to setups that one engine serves together."""
        ...


def run(job: Job, model: Model, records: Records, say: Callable[[str], None]) -> None:
    """Asks what is missing.

    Args:
        job: What is asked.
        model: What answers.
        records: Where answers are kept, one by one.
        say: Told what happens.

    Raises:
        KvplugError: A setup is refused, a task does not fit a context, or the model failed; what
            was answered before is kept.
    """
    model.check(job.setups)
    questions = job.questions()
    for number, question in enumerate(questions):
        say(f"writing prompt {number + 1} of {len(questions)}")
        model.prompts.of(question)
    for group in groups(job.setups):
        asked = [
            (setup, question)
            for setup in group
            for question in records.missing(setup.label, questions)
        ]
        if not asked:
            continue
        say(f"{group[0].label}: starting")
        done = 0
        for setup, question, reply in model.replies(group, asked):
            answer = model.prompts.answer(setup.label, question, reply)
            records.add(answer)
            done += 1
            say(
                f"{setup.label}: {done} of {len(asked)}, {question.task} at {question.context:,}: "
                f"{answer.score:.2f}"
            )
        if done < len(asked):
            raise KvplugError(f"{group[0].label} stopped after {done} of {len(asked)} answers.")


def setups_of(policies: list[str], budgets: list[int], own: dict[str, str]) -> list[Setup]:
    """Stock vLLM, then every policy at every budget.

    Args:
        policies: Recipes, or labels in ``own``.
        budgets: Far tokens per window and KV head.
        own: Label -> options as JSON, the policy among them.
    """
    from kvplug.config import json_object

    found = [Setup(STOCK, STOCK)]
    for name in policies:
        options = json_object(own[name], f"setup {name!r}") if name in own else {}
        policy = str(options.pop("policy", name))
        if policy == STOCK:
            continue
        found += [Setup(f"{name}@{budget}", policy, budget, options) for budget in budgets]
    return found
