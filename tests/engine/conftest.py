"""Runs engines for the tests of this folder, each in a process of its own, results kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.engine.forked import run_main, threads

Run = Callable[..., dict[str, Any]]


def run_child(spec: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs one spec of ``child.py`` to its end, whatever that is."""
    return run_main("child", json.dumps(spec), environment)


@cache
def run_cached(spec: str, environment: str) -> dict[str, Any]:
    """The result of a spec that must succeed."""
    done = run_child(json.loads(spec), **json.loads(environment))
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``start(spec, **environment)``: the finished process, whatever its exit code."""
    return run_child


@pytest.fixture(scope="session")
def run() -> Run:
    """``run(spec, **environment)``: the result; equal specs run once a session."""

    def run_spec(spec: dict[str, Any], **environment: str) -> dict[str, Any]:
        return run_cached(json.dumps(spec), json.dumps(environment))

    return run_spec


@pytest.fixture(scope="session")
def run_pretended() -> Run:
    """``run_pretended(spec, runner)``: of the backend for CUDA; the runner is vLLM's "1" or "0"."""

    def run_spec(spec: dict[str, Any], runner: str) -> dict[str, Any]:
        mine = {"OMP_NUM_THREADS": threads(), "VLLM_LOGGING_LEVEL": "WARNING",
                "VLLM_USE_V2_MODEL_RUNNER": runner}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "tests.engine.child"], input=json.dumps(spec), text=True,
            capture_output=True, env={**os.environ, **mine}, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return result

    return run_spec


@pytest.fixture(scope="session")
def recall_model() -> str:
    """Path of the recall model."""
    from kvplug.models.recall import recall_model_path

    return str(recall_model_path())


@pytest.fixture(scope="session")
def tokenizer(recall_model: str) -> Any:
    """The recall model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(recall_model)
