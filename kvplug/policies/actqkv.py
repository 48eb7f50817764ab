"""ActQKV: activation-aware probes and layer-wise budgets (Xiao et al. 2025, arXiv 2502.13542).

Deviations: queries are weighed after the rotary embedding and far keys keep their own positions,
where the paper puts all of them at one distance; statistics belong to one layer and one request,
are exact over its whole prompt, and are used from the second window on, where the released code
mixes all layers and requests and waits for 1,000 updates; a page's score is the sum of its cosines
with every query head, where the paper takes one cosine over all heads together, in which those of
the longest vectors decide; in prefill there is no term for the question, whose place in a prompt an
engine does not know (add a probe ``last_activated`` for the last tokens of every window); densities
are taken from standardised scores over a temperature, for those of plain cosines are all alike,
and from the prompt alone; a layer keeps at least 32 pages or half its budget, whichever is less,
and the total never exceeds the budget; representative keys are those of
:mod:`kvplug.policies.infllm`, with the deviations told there.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.budget.entropy import EntropyBudget
from kvplug.index.representative import Representative
from kvplug.policies.base import Policy, Stages
from kvplug.probe.activation import ActivationProbe


@dataclass(frozen=True)
class ActQkv(Policy):
    """Representative keys by cosine, the activation-bias probe, entropy budgets."""

    top: int = 4
    """Keys that represent a page, per KV head."""
    heads: str = "all"
    """``all`` KV heads share one list of pages, as in the paper, or ``each`` has its own."""
    warm_up: int = 1
    """Windows of a prompt before tokens are weighed; until then the probe is the mean query."""
    sharpness: float = 1.0
    """Power that token weights are raised to."""
    share: str = "all"
    """Who weighs a token: ``all`` heads together, as in the paper, or ``each`` KV head."""
    temperature: float = 0.5
    """Of the densities that layers share the budget by."""

    def __post_init__(self) -> None:
        """Refuses what the stages cannot serve."""
        self.stages()

    def stages(self) -> Stages:
        """See :meth:`Policy.stages`."""
        return Stages(
            index=Representative(top=self.top, metric="cosine", heads=self.heads),
            probe=ActivationProbe(self.warm_up, self.sharpness, self.share),
            budget=EntropyBudget(self.temperature),
        )
