"""Every policy under test, once. The shared contract tests run over this list.

A new policy gets a line here; ``tests/policies/test_contract.py`` fails until it has one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest


class PolicyCase(NamedTuple):
    """One recipe with one set of options."""

    name: str
    options: dict[str, Any]
    retrieves: bool = True
    """Whether it scores pages; without, a sparse window has no far pages at all."""
    always_dense: bool = False
    finds_a_key: bool = True
    """Whether one outstanding key is enough for its page to be found."""
    one_list: bool = False
    """Whether all KV heads select the same pages."""

    varies: bool = False
    """Whether the number of selected pages may differ between windows, heads and layers."""

    @property
    def id(self) -> str:
        """A readable test id."""
        return "-".join([self.name, *(f"{key}{value}" for key, value in self.options.items())])


POLICY_CASES = [
    PolicyCase("dense", {}, retrieves=False, always_dense=True),
    PolicyCase("streaming", {}, retrieves=False),
    PolicyCase("quest", {}),
    PolicyCase("channels", {}),
    PolicyCase("channels", {"bits": 64, "last": 2, "active": 3}),
    PolicyCase("simhash", {}),
    PolicyCase("simhash", {"last": 1, "active": 0}),
    PolicyCase("simhash", {"last": 3, "active": 7}),
    PolicyCase("emllm", {"max_tokens": 32}, finds_a_key=False, one_list=True),
    PolicyCase(
        "emllm", {"refine": "modularity", "min_tokens": 2, "contiguity": 0.0, "index": "minmax"}
    ),
    PolicyCase("infllm", {}, finds_a_key=False, one_list=True),
    PolicyCase("infllm", {"heads": "each"}, finds_a_key=False),
    PolicyCase("hax", {}, finds_a_key=False),
    PolicyCase("hax", {"bits": 8, "rounds": 3, "split": 0.8}, finds_a_key=False),
    PolicyCase("actqkv", {}, finds_a_key=False, one_list=True, varies=True),
    PolicyCase(
        "simhash", {"probe": ["activation", "last_activated"], "budget": "entropy"}, varies=True
    ),
    PolicyCase("quest", {"budget": {"name": "top_p", "p": 0.5, "temperature": 0.2}}, varies=True),
    PolicyCase("channels", {"budget": {"name": "recall", "target": 0.6, "every": 3}}, varies=True),
    PolicyCase("simhash", {"budget": {"name": "recall", "every": 1, "margin": 1.0}}, varies=True),
    PolicyCase(
        "hcam",
        {},
    ),
    PolicyCase(
        "hcam",
        {"pages": 3, "spread": 1.0},
    ),
]


def policy_params(
    *, retrieving: bool = False, sparse: bool = False, finds_a_key: bool = False
) -> list[Any]:
    """The list as pytest parameters.

    Args:
        retrieving: Only those that score pages.
        sparse: Only those that ever leave the dense path.
        finds_a_key: Only those for which one outstanding key is enough.
    """
    cases = [
        case
        for case in POLICY_CASES
        if not (retrieving and not case.retrieves)
        and not (sparse and case.always_dense)
        and not (finds_a_key and not case.finds_a_key)
    ]
    return [pytest.param(case, id=case.id) for case in cases]
