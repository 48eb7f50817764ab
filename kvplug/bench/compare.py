"""Runs the same job for several policies and sets the results side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from kvplug.bench.job import STOCK, UNSELECTED, Job
from kvplug.errors import KvplugError
from kvplug.machine import engine_environment
from kvplug.policies import check

BYTES_PER_GIB = 2**30


def compare(
    job: Job, policies: Sequence[str], dense_repeats: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measures the baseline first, then every policy, each in a process of its own.

    Args:
        job: What to measure; its ``policy`` is set for each.
        policies: Recipes, STOCK, UNSELECTED. The baseline is added if it is missing.
        dense_repeats: Times each cell of the baseline is measured.
        say: Told of each finished cell.

    Returns:
        The rows of the public interface, and ``same_tokens`` (whether greedy tokens equal the
        baseline's), ``needles`` and ``recalled`` (in rows of the longest context).

    Raises:
        KvplugError: Bad options, or an engine that fails; the message has its last words.
    """
    ordered = [STOCK, *(policy for policy in dict.fromkeys(policies) if policy != STOCK)]
    for policy in ordered[1:]:
        if policy != UNSELECTED:
            check({"policy": policy, **job.options}).check_page(job.page)
    rows: list[dict[str, Any]] = []
    baseline: dict[tuple[int, int], dict[str, Any]] = {}
    for policy in ordered:
        say(f"{policy}: starting its engine")
        mine = replace(job, policy=policy)
        if policy in (STOCK, UNSELECTED):  # their questions would be answered all the same
            mine = replace(mine, repeats=dense_repeats, needles=0)
        for kind, data in _run(mine):
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
    return rows


def _row(policy: str, data: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """One row of the public interface, and whether its tokens equal the baseline's."""
    tokens = data.pop("tokens") if data is not base else data["tokens"]
    return {
        "policy": policy,
        **{key: value for key, value in data.items() if key != "tokens"},
        "ttft_ratio": base["ttft_s"] / data["ttft_s"],
        "decode_ratio": data["decode_tok_s"] / base["decode_tok_s"],
        "same_tokens": tokens == base["tokens"],
        "needles": None,
        "recalled": None,
    }


def _kv_gib(job: Job) -> int:
    """GiB of KV cache that the largest cell needs, with room for block rounding."""
    from transformers import AutoConfig

    from kvplug.bench.engine import model_path

    config = AutoConfig.from_pretrained(model_path(job.model))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    tokens = max(job.batches) * (max(job.contexts) + job.decoded + 1024) * 1.1
    return max(1, -(-int(tokens * per_token) // BYTES_PER_GIB))


def _run(job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs one engine process; yields its results as they come."""
    environment = {**os.environ, **engine_environment(_kv_gib(job), in_process=True)}
    environment["VLLM_LOGGING_LEVEL"] = "ERROR"
    if job.policy == STOCK:
        environment["VLLM_PLUGINS"] = ""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvplug.bench.engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(job.to_json())
        process.stdin.close()
        for line in process.stdout:
            kind, _, data = line.partition(" ")
            if kind in ("CELL", "RECALL"):
                yield kind, json.loads(data)
        if process.wait():
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            words = lines[-1].strip() if lines else f"exit code {process.returncode}"
            raise KvplugError(f"The engine with policy {job.policy!r} failed: {words}")
