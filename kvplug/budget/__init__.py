"""Budget stage: how many far pages a window may select."""

from __future__ import annotations

from kvplug.budget.base import Budget
from kvplug.budget.entropy import EntropyBudget
from kvplug.budget.fixed import FixedBudget
from kvplug.budget.recall import RecallBudget
from kvplug.budget.top_p import TopPBudget
from kvplug.registry import Registry, registry_of

BUDGETS: Registry[type[Budget]] = registry_of(
    "budget", FixedBudget, EntropyBudget, TopPBudget, RecallBudget
)
