"""What offloading costs and what it buys: three cells, each beside its baseline.

- *near*: a needle's answer; successive tokens ask for nearby pages.
- *far*: a chain whose every word stands elsewhere; every token asks for other pages.
- *many*: requests that do not fit the memory together, beside stock vLLM under the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvplug.bench.child import BYTES_PER_GIB, kv_bytes, results
from kvplug.bench.job import STOCK, Job

HOT_SHARE = 8
"""A small pool is this part of the keys and values."""


def measure(
    job: Job, folder: Path, many: tuple[int, int], say: Callable[[str], None],
    rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Runs every cell.

    Args:
        job: The engine; its contexts are those of *near* and *far*, its options kvplug's.
        folder: On the disk.
        many: Requests, and tokens of each, that share a memory of half of their keys and values.
        say: Told of each finished cell.
        rows: Written, as they are measured: ``cell``, ``cache``, what
            :class:`kvplug.bench.job.Cell` has, and ``ttft_ratio``, ``decode_ratio`` and
            ``total_ratio``, speeds over those of the cell's first row.

    Raises:
        KvplugError: An engine fails.
    """

    def run(cell: str, cache: str, mine: Job) -> None:
        for row in _run(cell, cache, mine, say):
            rows.append(row)
            rows[-1] = _with_ratios(row, rows)

    whole = kv_bytes(job, max(job.contexts) + job.decoded + 1024) / BYTES_PER_GIB
    caches = {
        "in memory": None,
        f"on disk, 1/{HOT_SHARE} hot": _disk(folder, whole / HOT_SHARE, 2 * whole),
        "on disk, all hot": _disk(folder, 1.1 * whole, 2 * whole),
    }
    for cell in ("needle", "chain"):
        for name, offload in caches.items():
            mine = replace(job, document=cell, options=_with(job.options, offload))
            run("near" if cell == "needle" else "far", name, mine)
    requests, context = many
    together = kv_bytes(job, requests * (context + job.decoded)) / BYTES_PER_GIB
    memory = max(1, round(together / 2))
    crowd = replace(job, contexts=[context], batches=[requests], repeats=1)
    stock = replace(crowd, policy=STOCK, options={}, kv_gib=memory)
    run("many", f"stock vLLM, {memory} GiB", stock)
    offload = _disk(folder, memory / 2, max(2 * together, memory))
    crowd = replace(crowd, options=_with(job.options, offload))
    run("many", f"on disk, {memory / 2:g} GiB hot", crowd)


def _disk(folder: Path, hot_gib: float, cold_gib: float) -> dict[str, Any]:
    return {"tier": "disk", "path": str(folder), "hot_gib": hot_gib, "cold_gib": cold_gib}


def _with(options: dict[str, Any], offload: dict[str, Any] | None) -> dict[str, Any]:
    return options if offload is None else {**options, "offload": offload}


def _run(cell: str, cache: str, job: Job, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Rows of one engine."""
    say(f"{cell}, {cache}: starting its engine")
    for _, data in results("kvplug.bench.engine", job, job.to_json()):
        del data["tokens"]
        yield {"cell": cell, "cache": cache, **data}


def _with_ratios(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row, with its speeds over those of the first row of its cell and context."""
    same = ("cell", "context_tokens", "batch")
    base = next(each for each in rows if all(each[key] == row[key] for key in same))
    return {
        **row,
        "ttft_ratio": base["ttft_s"] / row["ttft_s"],
        "decode_ratio": row["decode_tok_s"] / base["decode_tok_s"]
        if base["decode_tok_s"]
        else None,
        "total_ratio": base["total_s"] / row["total_s"],
    }
