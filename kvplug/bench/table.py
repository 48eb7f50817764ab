"""Measures ``kvplug bench recipes``: stock vLLM, then every row in an engine of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvplug.bench.child import results
from kvplug.bench.job import STOCK, Job
from kvplug.bench.recipes import Recipe
from kvplug.bench.sweep import Sweep
from kvplug.errors import KvplugError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a table holds."""

    job: Job
    """Engine settings, contexts and repeats; policy and options are set for each row."""
    recipes: list[Recipe]
    """Rows besides stock vLLM."""
    budgets: list[int]
    """Far tokens per window and KV head."""
    needles: list[int]
    """Questions for each of the job's contexts, 0 for none."""
    mass_questions: int
    """Questions during which captured mass is measured."""
    dense_repeats: int
    """Times stock vLLM's first token is measured where recipes' are measured several times."""

    def __post_init__(self) -> None:
        """Checks every recipe with every budget.

        Raises:
            KvplugError: One of them cannot serve, or needles do not match contexts.
        """
        if len(self.needles) != len(self.job.contexts):
            raise KvplugError(
                f"There are {len(self.job.contexts)} contexts and {len(self.needles)} numbers of "
                f"needles: give one number, or one for each context."
            )
        for recipe in self.recipes:
            for budget in self.budgets:
                recipe.config(budget, self.job.page)

    def sweeps(self) -> Iterator[tuple[Recipe | None, Sweep]]:
        """What each engine measures; None is stock vLLM, the first."""
        stock = replace(self.job, policy=STOCK, repeats=self.dense_repeats)
        yield None, Sweep(stock, [0], self.needles, 0)
        for recipe in self.recipes:
            budgets = self.budgets if self._heeds(recipe) else self.budgets[:1]
            options = {key: value for key, value in recipe.options.items() if key != "policy"}
            job = replace(self.job, policy=recipe.policy, options={**options, "budget": budgets[0]})
            yield recipe, Sweep(job, budgets, self.needles, self.mass_questions)

    def _heeds(self, recipe: Recipe) -> bool:
        return recipe.heeds(self.budgets, self.job.page)

    def row(self, recipe: Recipe | None, cell: dict[str, Any], base: dict[str, Any]) -> Row:
        """A cell as a row of the table.

        Args:
            recipe: Its recipe; None for stock vLLM.
            cell: As :mod:`kvplug.bench.sweep` printed it.
            base: Stock vLLM's cell of the same context.
        """
        heeded = recipe is not None and self._heeds(recipe)
        return {
            "recipe": STOCK if recipe is None else recipe.label,
            **cell,
            "budget_tokens": cell["budget_tokens"] if heeded else None,
            "ttft_ratio": base["ttft_s"] / cell["ttft_s"],
            "decode_ratio": cell["decode_tok_s"] / base["decode_tok_s"],
        }


Row = dict[str, Any]
"""``recipe``, ``context_tokens``, ``budget_tokens`` (None: it heeds none), ``needles``,
``recalled``, ``mass``, ``best_mass``, ``mass_by_layer``, ``ttft_s``, ``ttft_ratio``,
``decode_tok_s``, ``decode_ratio``, ``index_bytes_per_token``."""


def measure(
    plan: Plan, say: Say, keep: Callable[[list[Row], dict[str, str]], None]
) -> tuple[list[Row], dict[str, str]]:
    """Measures a table.

    A recipe whose engine fails does not cost the others their figures.

    Args:
        plan: What it holds.
        say: Told of each finished cell.
        keep: Given what there is after every engine.

    Returns:
        The rows, and what failed: label -> the reason.

    Raises:
        KvplugError: Stock vLLM failed; there is nothing to compare with.
    """
    rows: list[Row] = []
    failures: dict[str, str] = {}
    base: dict[int, dict[str, Any]] = {}
    for recipe, sweep in plan.sweeps():
        label = STOCK if recipe is None else recipe.label
        say(f"{label}: starting its engine")
        try:
            for _, cell in results("kvplug.bench.sweep", sweep.job, sweep.to_json()):
                if recipe is None:
                    base[cell["context_tokens"]] = cell
                rows.append(plan.row(recipe, cell, base[cell["context_tokens"]]))
                say(f"{label}: {_told(rows[-1])}")
        except KvplugError as error:
            if recipe is None:
                raise
            failures[label] = str(error)
            say(str(error))
        keep(rows, failures)
    return rows, failures


def _told(row: Row) -> str:
    """A row in words."""
    words = [f"{row['context_tokens']:,} tokens"]
    if row["budget_tokens"]:
        words.append(f"budget {row['budget_tokens']}")
    if row["needles"]:
        words.append(f"{row['recalled']} of {row['needles']} needles")
    return ", ".join([*words, f"first token {row['ttft_s']:.2f} s"])


def numbers_for(contexts: Sequence[int], numbers: Sequence[int]) -> list[int]:
    """One number for each context, where one may stand for all."""
    return list(numbers) * len(contexts) if len(numbers) == 1 else list(numbers)
