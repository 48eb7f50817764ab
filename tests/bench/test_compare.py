"""``kvplug bench policies``: rows of engines, and what is told of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvplug.bench import compare
from kvplug.bench.command import benches
from kvplug.bench.job import Job
from kvplug.bench.speed_table import speed_table
from kvplug.errors import KvplugError

SPEEDS = {"dense": (8.0, 50.0, 9.0), "simhash": (1.0, 200.0, 1.5)}


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are made up; that of ``quest`` fails behind its first cell."""

    def results(_: str, job: Job, __: str) -> Iterator[tuple[str, Any]]:
        ttft, decode, total = SPEEDS.get(job.policy, (4.0, 100.0, 4.5))
        for context in job.contexts:
            cell = {"context_tokens": context, "batch": 1, "ttft_s": ttft, "decode_tok_s": decode}
            yield "CELL", {**cell, "total_s": total, "correct": True, "tokens": [[1, 2]]}
            if job.policy == "quest":
                raise KvplugError("The engine with policy 'quest' failed: out of memory")
        if job.needles:
            yield "RECALL", {"context_tokens": max(job.contexts), "needles": 9, "recalled": 8}

    monkeypatch.setattr(compare, "results", results)


def test_rows_have_ratios_to_stock_vllm_and_recall_in_the_longest_context() -> None:
    """Speeds over the baseline's cell of the same size."""
    rows: list[dict[str, Any]] = []
    job = Job("", "recall", [4096, 8192], [1], 1, 32, 4096, 8, False, 9, {"budget": 512})
    compare.compare(job, ["simhash"], 1, lambda _: None, rows)
    assert [row["policy"] for row in rows] == ["dense", "dense", "simhash", "simhash"]
    assert [row["ttft_ratio"] for row in rows] == [1, 1, 8, 8]
    assert [row["decode_ratio"] for row in rows] == [1, 1, 4, 4]
    assert [row["total_ratio"] for row in rows] == [1, 1, 6, 6]
    assert [row["recalled"] for row in rows] == [None, None, None, 8]
    assert all(row["same_tokens"] for row in rows)


@pytest.mark.parametrize("as_json", [True, False])
def test_what_was_measured_is_told_where_a_later_engine_fails(as_json: bool) -> None:
    """Minutes of measuring are not thrown away."""
    flags = ["--policies", "simhash,quest", "--contexts", "4096,8192"]
    result = CliRunner().invoke(benches, ["policies", *flags, *["--json"] * as_json])
    assert isinstance(result.exception, KvplugError)
    if as_json:
        rows = json.loads(result.stdout)
        assert [row["policy"] for row in rows] == ["dense"] * 2 + ["simhash"] * 2 + ["quest"]
    else:
        assert "simhash" in result.stdout
        assert "quest" in result.stdout


def test_a_table_can_be_read_in_eighty_columns_less_what_says_nothing() -> None:
    """Times stand beside their ratios, whole."""
    row = {
        "policy": "channels", "context_tokens": 131072, "batch": 1, "ttft_s": 14.83,
        "decode_tok_s": 378.4, "total_s": 15.2, "correct": True, "ttft_ratio": 36.04,
        "decode_ratio": None, "total_ratio": 35.1, "needles": None,
    }  # fmt: skip
    console = Console(width=80)
    with console.capture() as captured:
        console.print(speed_table("title", ["policy"], [row, {**row, "policy": "simhash"}]))
    text = captured.get()
    for cell in ("channels", "131,072", "14.8 36x", " 378 ", "15.2 35.1x", "yes"):
        assert cell in text
    assert "batch" not in text
    assert "needles" not in text
