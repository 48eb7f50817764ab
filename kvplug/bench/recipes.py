"""The rows of ``kvplug bench recipes``: recipes with their defaults, and named configurations.

A configuration is what ``--additional-config '{"kvplug": ...}'`` takes, without the budget. To add
a row to the table, add it to CONFIGURATIONS with the reason for it; every registered recipe has a
row of its own by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from kvplug.bench.job import STOCK
from kvplug.config import KvplugConfig, json_object
from kvplug.errors import KvplugError, nearest_name
from kvplug.pipeline import region_sizes
from kvplug.policies import POLICIES, check


class Recipe(NamedTuple):
    """A row of the table."""

    label: str
    """What the table calls it."""
    options: dict[str, Any]
    """kvplug's options, ``policy`` included, ``budget`` not."""
    why: str = ""
    """What a configuration is for, in one sentence."""

    @property
    def policy(self) -> str:
        """The recipe's name."""
        return str(self.options["policy"])

    def config(self, budget: int, page: int) -> KvplugConfig:
        """The options with a budget, checked.

        Raises:
            KvplugError: They are wrong, in themselves or for the page.
        """
        config = check({**self.options, "budget": budget})
        config.check_page(page)
        return config

    def heeds(self, budgets: Sequence[int], page: int) -> bool:
        """Whether the recipe attends to more or less with one of these budgets than with another.

        Raises:
            KvplugError: See :meth:`config`.
        """
        sizes = {region_sizes(self.config(budget, page), page) for budget in budgets}
        return len(sizes) > 1 or len(budgets) == 1


CONFIGURATIONS: tuple[Recipe, ...] = (
    Recipe(
        "actqkv-hash",
        {
            "policy": "actqkv",
            "options": {"index": "simhash", "probe": ["activation", "last_activated"]},
        },
        "A page's representative keys do not hold the one key that is asked for, hashes of every "
        "key do; and a mean of 256 queries, however weighed, is not the question, the last are.",
    ),
    Recipe(
        "emllm-hash",
        {"policy": "emllm", "options": {"index": "simhash", "probe": "last_activated"}},
        "A page's representative keys are those that its neighbours attended to, and the one key "
        "that a later question needs is rarely among them; hashes of every key find its page, and "
        "the last tokens of a window ask for it where their mean does not.",
    ),
)
"""Configurations besides the defaults."""


def all_recipes() -> dict[str, Recipe]:
    """Every row of the default table, by label: each recipe, and its configurations behind it."""
    rows = {name: Recipe(name, {"policy": name}) for name in POLICIES if name != STOCK}
    rows |= {recipe.label: recipe for recipe in CONFIGURATIONS}
    return dict(sorted(rows.items(), key=lambda row: row[1].policy))


def parse_recipe(text: str) -> Recipe:
    """The recipe of ``--recipe LABEL='{"policy": ..., "options": {...}}'``.

    Args:
        text: A label, ``=``, and kvplug's options; without ``policy``, the label names it.

    Raises:
        KvplugError: It is written in another way.
    """
    label, sign, written = text.partition("=")
    if not sign or not re.fullmatch(r"[^\s,=]+", label):
        raise KvplugError(
            f"--recipe {text!r} must be LABEL=OPTIONS, such as "
            f"""quest-wide='{{"policy": "quest", "local": 1024}}'."""
        )
    options = json_object(written, f"--recipe {label}")
    if "budget" in options:
        raise KvplugError(f"--recipe {label} has a budget: leave it out and use --budgets.")
    recipe = Recipe(label, {"policy": label, **options})
    if recipe.policy == STOCK:
        raise KvplugError(f"--recipe {label} is stock vLLM, which is measured in any case.")
    return recipe


def chosen_recipes(names: str, written: Iterable[str]) -> list[Recipe]:
    """The rows that a user asked for, in their order.

    Args:
        names: Labels with commas between them, ``all`` for the default table.
        written: Values of ``--recipe``, added behind them.

    Raises:
        KvplugError: An unknown or repeated label; options are not looked at.
    """
    known = all_recipes()
    chosen: dict[str, Recipe] = {}
    for name in filter(None, (name.strip() for name in names.split(","))):
        if name == "all":
            chosen |= known
        elif name != STOCK:  # it is measured in any case
            chosen[name] = known.get(name) or _of_another_package(name, known)
    for text in written:
        recipe = parse_recipe(text)
        if recipe.label in (STOCK, *known, *chosen):
            raise KvplugError(f"--recipe {recipe.label}: the name is taken; choose another label.")
        chosen[recipe.label] = recipe
    return list(chosen.values())


def _of_another_package(name: str, known: Iterable[str]) -> Recipe:
    """A recipe that is found by its entry point."""
    others = [entry.name for entry in entry_points(group="kvplug.policies")]
    if name not in others:
        raise KvplugError(f"Unknown policy {name!r}: {nearest_name(name, [*known, *others])}.")
    return Recipe(name, {"policy": name})
