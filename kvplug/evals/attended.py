"""How many tokens of a context a query of the answer attends to."""

from __future__ import annotations

from kvplug.config import KvplugConfig
from kvplug.evals.plan import Setup
from kvplug.pipeline import region_sizes


def attended_tokens(setup: Setup, page: int, prompt: int) -> int:
    """Sinks, budget and local region of a setup, for a prompt of ``prompt`` tokens.

    A peer keeps as many as kvplug's own setup attends to by default.
    """
    if setup.budget is None:
        return prompt
    policy = {} if setup.is_peer else {"policy": setup.policy}
    config = KvplugConfig.parse({**policy, "budget": setup.budget, **setup.options})
    geometry = region_sizes(config, page)
    if prompt <= geometry.dense_below:
        return prompt
    pages = geometry.sink_pages + geometry.budget_pages
    return min(pages * page + geometry.local, prompt)
