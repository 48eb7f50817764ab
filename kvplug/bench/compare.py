"""Runs the same job for several policies and sets the results side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvplug.bench.child import results
from kvplug.bench.job import STOCK, UNSELECTED, Job
from kvplug.policies import check


def compare(
    job: Job, policies: Sequence[str], dense_repeats: int, say: Callable[[str], None],
    rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Measures the baseline first, then every policy, each in a process of its own.

    Args:
        job: What to measure; its ``policy`` is set for each.
        policies: Recipes, STOCK, UNSELECTED. The baseline is added if it is missing.
        dense_repeats: Times each cell of the baseline is measured.
        say: Told of each finished cell.
        rows: Written, as they are measured: the rows of the public interface, and ``same_tokens``
            (whether greedy tokens equal the baseline's), ``needles`` and ``recalled`` (in rows of
            the longest context).

    Raises:
        KvplugError: Bad options, or an engine that fails; the message has its last words.
    """
    ordered = [STOCK, *(policy for policy in dict.fromkeys(policies) if policy != STOCK)]
    for policy in ordered[1:]:
        if policy != UNSELECTED:
            check({"policy": policy, **job.options}).check_page(job.page)
    baseline: dict[tuple[int, int], dict[str, Any]] = {}
    for policy in ordered:
        say(f"{policy}: starting its engine")
        mine = replace(job, policy=policy)
        if policy in (STOCK, UNSELECTED):  # their questions would be answered all the same
            mine = replace(mine, repeats=dense_repeats, needles=0)
        for kind, data in results("kvplug.bench.engine", mine, mine.to_json()):
            if kind == "RECALL":
                for row in rows:
                    if row["policy"] == policy and row["context_tokens"] == data["context_tokens"]:
                        row.update(needles=data["needles"], recalled=data["recalled"])
                say(f"{policy}: recalled {data['recalled']} of {data['needles']} needles")
                continue
            cell = (data["context_tokens"], data["batch"])
            base = baseline.setdefault(cell, data)
            rows.append(_row(policy, data, base))
            say(f"{policy}: {cell[0]} tokens x {cell[1]} done")


def _row(policy: str, data: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """One row of the public interface, and whether its tokens equal the baseline's."""
    tokens = data.pop("tokens") if data is not base else data["tokens"]
    return {
        "policy": policy,
        **{key: value for key, value in data.items() if key != "tokens"},
        "ttft_ratio": base["ttft_s"] / data["ttft_s"],
        "decode_ratio": data["decode_tok_s"] / base["decode_tok_s"],
        "total_ratio": base["total_s"] / data["total_s"],
        "same_tokens": tokens == base["tokens"],
        "needles": None,
        "recalled": None,
    }
