"""kvpress's methods on the same prompts, at as many tokens kept as kvplug attends to.

They prune the cache for good where kvplug keeps it and chooses anew, and they run on transformers'
own model: answers are compared, speeds are not. kvpress wants packages of its own, so it lives in
an environment of its own (``make peers``).
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvplug.bench.engine import model_path
from kvplug.errors import KvplugError
from kvplug.evals import kvpress_answers
from kvplug.evals.attended import attended_tokens
from kvplug.evals.plan import Question, Settings, Setup
from kvplug.evals.prompts import Prompts, Reply
from kvplug.evals.tasks import TASKS

METHODS = ("snapkv", "tova", "expected_attention", "knorm")
"""SnapKV (Li et al. 2024, arXiv 2404.14469), TOVA (Oren et al. 2024, arXiv 2401.06104), Expected
Attention (Devoto et al. 2025, arXiv 2510.00636), L2 norm (Devoto et al. 2024, arXiv 2406.11430)."""
VARIABLE = "KVPLUG_PEERS_PYTHON"
"""Names the Python that has kvpress."""


def setups_of_peers(methods: list[str], budgets: list[int]) -> list[Setup]:
    """Every method at every budget.

    Raises:
        KvplugError: A method is not one of METHODS.
    """
    for method in methods:
        if method not in METHODS:
            raise KvplugError(f"There is no peer {method!r}: choose from {', '.join(METHODS)}.")
    return [
        Setup(f"{method}@{budget}", method, budget, is_peer=True)
        for method in methods
        for budget in budgets
    ]


def peers_python() -> Path:
    """The Python that has kvpress.

    Raises:
        KvplugError: There is none.
    """
    path = Path(os.environ.get(VARIABLE) or ".venv-peers/bin/python").absolute()
    if path.exists():
        found = subprocess.run([path, "-c", "import kvpress"], capture_output=True, check=False)
        if found.returncode == 0:
            return path
    raise KvplugError(
        f"Peers run in an environment of their own, and {str(path)!r} has no kvpress: run 'make "
        f"peers', or set {VARIABLE} to a Python that has it."
    )


def peer_replies(
    settings: Settings, prompts: Prompts, asked: list[tuple[Setup, Question]]
) -> Iterator[tuple[Setup, Question, Reply]]:
    """Puts questions to one method.

    Raises:
        KvplugError: It failed; the message has its last words.
    """
    rows = []
    for number, (setup, question) in enumerate(asked):
        prompt, tokens = prompts.of(question)
        kept = attended_tokens(setup, settings.page, tokens)
        rows.append((number, kept, prompt.prompt, TASKS.get(question.task).max_tokens))
    method = asked[0][0].policy
    request = {
        "model": model_path(settings.model), "method": method, "threads": settings.threads,
        "asked": rows,
    }  # fmt: skip
    command = [str(peers_python()), kvpress_answers.__file__]
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as errors:
        json.dump(request, given)
        given.seek(0)
        process = subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            kind, _, data = line.partition(" ")
            if kind == "REPLY":
                number, reply = json.loads(data)
                yield *asked[number], Reply(**reply)
        if process.wait():
            errors.seek(0)
            words = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise KvplugError(f"Peer {method!r} failed: {words[-1].strip()}")
