"""Reads what ``vllm bench serve --save-result`` wrote, to draw it beside a load test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug.errors import KvplugError
from kvplug.loadtests.summary import SHARES, percentiles

NEEDED = ("duration", "completed", "request_throughput", "output_throughput")
LOAD = ("request_rate", "burstiness", "max_concurrency", "num_prompts", "model_id", "backend")


@dataclass(frozen=True)
class Foreign:
    """A result of another tool. Its latencies count from sending, not from the intended time."""

    label: str
    """The file's name."""
    load: dict[str, Any]
    """What it asked for."""
    requests: int
    """That succeeded."""
    failed: int | None
    seconds: float
    requests_per_s: float
    output_tok_s: float
    ttft: dict[str, float]
    """Name of a quantile -> seconds; only those that the file tells, or has the values for."""
    gap: dict[str, float]
    total: dict[str, float]


def read(path: Path) -> Foreign:
    """The result in a file.

    Raises:
        KvplugError: It is not one.
    """
    try:
        told = json.loads(path.read_text())
        missing = [name for name in NEEDED if not isinstance(told[name], int | float)]
    except (OSError, ValueError) as error:
        raise KvplugError(f"{str(path)!r} cannot be read as JSON: {error}.") from None
    except (KeyError, TypeError) as error:
        missing = [str(error).strip("'")]
    if missing:
        raise KvplugError(
            f"{str(path)!r} is not a result of `vllm bench serve`: {', '.join(missing)} is no "
            f"number in it."
        )
    return Foreign(
        path.stem, {name: told[name] for name in LOAD if told.get(name) is not None},
        int(told["completed"]), told.get("failed"), float(told["duration"]),
        float(told["request_throughput"]), float(told["output_throughput"]),
        _quantiles(told, "ttft", "ttfts"), _quantiles(told, "itl", "itls"),
        _quantiles(told, "e2el", "latencies"),
    )  # fmt: skip


def _quantiles(told: Mapping[str, Any], name: str, raw: str) -> dict[str, float]:
    """Quantiles in seconds: from every value where the file has them, or else as it says."""
    values, errors = told.get(raw), told.get("errors") or ()
    if isinstance(values, list) and values:
        groups = [value if isinstance(value, list) else [value] for value in values]
        if len(errors) == len(groups):
            groups = [group for group, error in zip(groups, errors, strict=True) if not error]
        return {share: found.value for share, found in percentiles(groups).items()}
    found = {}
    for share in SHARES:
        key = f"median_{name}_ms" if share == "p50" else f"{share}_{name}_ms"
        if isinstance(told.get(key), int | float):
            found[share] = told[key] / 1000
    return found
