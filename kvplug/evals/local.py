"""Answers of models on this machine: stock vLLM, kvplug's recipes and peers, an engine each."""

from __future__ import annotations

import json
from collections.abc import Iterator

from kvplug.bench.child import results
from kvplug.bench.engine import model_path
from kvplug.bench.job import Job as EngineJob
from kvplug.evals.engine import Request
from kvplug.evals.peers import peer_replies, peers_python
from kvplug.evals.plan import STOCK, Question, Settings, Setup
from kvplug.evals.prompts import Prompts, Reply
from kvplug.evals.tasks import TASKS
from kvplug.policies import check


class LocalModel:
    """A checkpoint.

    Args:
        settings: Of the run.
    """

    def __init__(self, settings: Settings) -> None:
        """Loads the tokenizer."""
        from transformers import AutoTokenizer

        self.settings = settings
        tokenizer = AutoTokenizer.from_pretrained(model_path(settings.model))
        self.prompts = Prompts(settings, lambda text: len(tokenizer(text)["input_ids"]))

    def check(self, setups: list[Setup]) -> None:
        """Refuses recipes and options that would not start, and peers that are not installed.

        Raises:
            KvplugError: The first thing that is wrong.
        """
        if any(setup.is_peer for setup in setups):
            peers_python()
        for setup in setups:
            if setup.policy != STOCK and not setup.is_peer:
                config = check({"policy": setup.policy, "budget": setup.budget, **setup.options})
                config.check_page(self.settings.page)

    def replies(
        self, setups: list[Setup], asked: list[tuple[Setup, Question]]
    ) -> Iterator[tuple[Setup, Question, Reply]]:
        """Puts questions to setups that differ in their budget only.

        Raises:
            KvplugError: The engine failed.
        """
        if setups[0].is_peer:
            yield from peer_replies(self.settings, self.prompts, asked)
            return
        questions = [
            (setups.index(setup), number, self.prompts.of(question).example.prompt,
             TASKS.get(question.task).max_tokens)
            for number, (setup, question) in enumerate(asked)
        ]  # fmt: skip
        budgets = [setup.budget for setup in setups]
        options = dict(setups[0].options)
        if budgets[0] is not None:
            options["budget"] = budgets[0]
        longest = max(question.context for _, question in asked)
        job = EngineJob(
            setups[0].policy, self.settings.model, [longest], [1], 1, self.settings.page,
            self.settings.chunk, max(most for *_, most in questions), self.settings.eager, 0,
            options,
        )  # fmt: skip
        request = Request(job, budgets, questions, self.settings.selector)
        for _, (_, number, reply) in results("kvplug.evals.engine", job, request.to_json()):
            yield *asked[number], Reply(**reply)


def groups(setups: list[Setup]) -> list[list[Setup]]:
    """Setups that one engine can serve together."""
    found: dict[str, list[Setup]] = {}
    for setup in setups:
        key = json.dumps([setup.is_peer, setup.policy, setup.options], sort_keys=True)
        found.setdefault(key, []).append(setup)
    return list(found.values())
