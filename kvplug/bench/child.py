"""Runs a process with one engine and reads its results as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from kvplug.bench.job import STOCK, Job
from kvplug.errors import KvplugError
from kvplug.machine import engine_environment

BYTES_PER_GIB = 2**30
KINDS = ("CELL", "RECALL", "REPLY")
"""First words of the lines that are results; anything else is vLLM talking."""


def results(module: str, job: Job, text: str) -> Iterator[tuple[str, Any]]:
    """Runs ``python -m MODULE`` to its end; yields the kind and data of each result.

    Args:
        module: What to run.
        job: Its engine.
        text: Its standard input.

    Raises:
        KvplugError: It failed; the message has its last words.
    """
    environment = {**os.environ, **engine_environment(_kv_gib(job), in_process=True)}
    environment["VLLM_LOGGING_LEVEL"] = "ERROR"
    if job.policy == STOCK:
        environment["VLLM_PLUGINS"] = ""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(text)
        process.stdin.close()
        for line in process.stdout:
            kind, _, data = line.partition(" ")
            if kind in KINDS:
                yield kind, json.loads(data)
        if process.wait():
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            words = lines[-1].strip() if lines else f"exit code {process.returncode}"
            raise KvplugError(f"The engine with policy {job.policy!r} failed: {words}")


def _kv_gib(job: Job) -> int:
    """GiB of KV cache that the largest cell needs, with room for block rounding."""
    if job.kv_gib is not None:
        return job.kv_gib
    tokens = max(job.batches) * (max(job.contexts) + job.decoded + 1024) * 1.1
    return max(1, -(-kv_bytes(job, int(tokens)) // BYTES_PER_GIB))


def kv_bytes(job: Job, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in 16 bits."""
    from transformers import AutoConfig

    from kvplug.bench.engine import model_path

    config = AutoConfig.from_pretrained(model_path(job.model))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return int(tokens * per_token)
