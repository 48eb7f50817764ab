"""What a request may ask for itself: a budget or recall target of its own, dense attention, counts.

A client sends them as ``vllm_xargs`` of the OpenAI API, each with ``kvplug_`` before its name; a
Python program as ``SamplingParams.extra_args``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvplug.budget.recall import RecallBudget
from kvplug.errors import KvplugError, clause, nearest_name
from kvplug.policies import make_stages

if TYPE_CHECKING:
    from kvplug.config import KvplugConfig
    from kvplug.policies.base import Stages

PREFIX = "kvplug_"


class Knobs(BaseModel):
    """One request's wishes; what it leaves out is as the engine's options say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: int | None = Field(
        default=None, gt=0, strict=True, description="far tokens attended per window and KV head"
    )
    dense: bool = Field(default=False, description="attend to everything")
    recall_target: float | None = Field(
        default=None, gt=0, le=1, strict=True, description="share of exact attention to hold"
    )
    usage: bool = Field(default=False, description="say in usage what was attended to")

    @property
    def steers(self) -> bool:
        """Whether they change what is attended to."""
        return self.dense or self.budget is not None or self.recall_target is not None

    @classmethod
    def parse(cls, extra: Mapping[str, Any] | None) -> Knobs | None:
        """Reads a request's extra arguments.

        Args:
            extra: All of them; those of other extensions are left alone. May be None.

        Returns:
            None where none of them is kvplug's.

        Raises:
            KvplugError: An unknown name or a value out of range.
        """
        given = (extra or {}).items()
        mine = {name[len(PREFIX) :]: value for name, value in given if name.startswith(PREFIX)}
        if not mine:
            return None
        for name in mine:
            if name not in cls.model_fields:
                known = nearest_name(PREFIX + name, [PREFIX + each for each in cls.model_fields])
                raise KvplugError(f"Unknown request option {PREFIX + name!r}: {known}.")
        try:
            return cls.model_validate(mine)
        except ValidationError as error:
            problem = error.errors()[0]
            name = str(problem["loc"][0])
            raise KvplugError(
                f"Request option {PREFIX}{name}={mine[name]!r} "
                f"({cls.model_fields[name].description}): {clause(problem['msg'])}."
            ) from None

    def within(self, config: KvplugConfig, page: int, max_context: int) -> Knobs | None:
        """What is left of them in an engine.

        Args:
            config: The engine's options.
            page: Its tokens per page.
            max_context: Most tokens of a context.

        Returns:
            None where they change nothing of what is attended to.

        Raises:
            KvplugError: The engine cannot do it.
        """
        stages = make_stages(config.policy, config.options)
        if self.dense:
            self._check_dense(config)
            return None if stages.always_dense else self
        if self.budget is not None:
            self._check_budget(config, page, max_context)
            if stages.always_dense or not stages.budget.pages(self.budget, page):
                raise KvplugError(
                    f"Policy {config.policy!r} takes no {PREFIX}budget: leave it out."
                )
        left = Knobs(
            budget=None if self.budget == config.budget else self.budget,
            recall_target=self._check_target(stages),
        )
        return None if left == Knobs() else left

    def _check_dense(self, config: KvplugConfig) -> None:
        """Refuses dense attention beside wishes that mean nothing then, or to cold pages.

        Raises:
            KvplugError: With the reason.
        """
        for name, value in (("budget", self.budget), ("recall_target", self.recall_target)):
            if value is not None:
                raise KvplugError(
                    f"Request options {PREFIX}dense and {PREFIX}{name} exclude each other: a dense "
                    f"request attends to everything."
                )
        if config.offload is not None:
            raise KvplugError(
                f"Request option {PREFIX}dense is not served with offload: most of the cache is "
                f"not in memory."
            )

    def _check_target(self, stages: Stages) -> float | None:
        """The target, where it differs from the engine's.

        Raises:
            KvplugError: The engine steers by none.
        """
        if self.recall_target is None:
            return None
        if not isinstance(stages.budget, RecallBudget):
            raise KvplugError(
                f"Request option {PREFIX}recall_target needs an engine with budget 'recall', not "
                f'{stages.budget.name!r}: serve it with --options \'{{"budget": "recall"}}\'.'
            )
        return None if self.recall_target == stages.budget.target else self.recall_target

    def _check_budget(self, config: KvplugConfig, page: int, max_context: int) -> None:
        """Refuses budgets that no window can have.

        Raises:
            KvplugError: With the range.
        """
        least, most, why = page, max_context, "the longest context"
        if config.offload is not None:
            most, why = config.budget, "the engine's budget, which its hot pool is made for"
        assert self.budget is not None
        if self.budget < least:
            raise KvplugError(
                f"Request option {PREFIX}budget={self.budget} must be at least one page of {page} "
                f"tokens."
            )
        if self.budget > most:
            raise KvplugError(
                f"Request option {PREFIX}budget={self.budget} must be at most {most}, {why}."
            )

    def salt(self, salt: str | None) -> str:
        """A cache salt under which only requests with the same wishes share pages.

        Keys and values of later layers depend on what earlier layers attended to.

        Args:
            salt: The request's own.
        """
        # No salt from a JSON string that a person types begins with a NUL.
        wishes = f"dense={self.dense:d} budget={self.budget} recall={self.recall_target}"
        return f"\0kvplug {wishes} {salt or ''}"
