"""Tensor and data parallelism: as many workers as cores here, and the answers of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from kvplug.machine import engine_environment
from kvplug.models.documents import NeedlePrompt, needle_prompt
from kvplug.serve.server import running_server

pytestmark = pytest.mark.engine
FLAGS = [
    "--budget", "256", "--dense-below", "512", "--max-model-len", "4096", "--dtype", "bfloat16",
    "--served-model-name", "recall", "--enforce-eager", "--no-enable-log-requests",
]  # fmt: skip
DECODED = 24


class Replies(NamedTuple):
    """What a server answers."""

    tokens: list[list[int]]
    """Greedy token ids of every prompt."""
    usage: list[dict[str, int]]
    """What each attended to."""
    workers: list[dict[str, Any]]
    """What the workers say of themselves."""


def replies(model: str, prompts: list[list[int]], flags: list[str], folder: Any) -> Replies:
    """Starts a server and asks it every prompt."""
    command = ["-m", "kvplug", "serve", model, *FLAGS, *flags]
    cores = sorted(os.sched_getaffinity(0))
    bound = "|".join(str(cores[n % len(cores)]) for n in range(2))
    environment = {
        **engine_environment(1, in_process=False),
        "VLLM_CPU_OMP_THREADS_BIND": bound,  # by itself vLLM wants a NUMA node for each worker
    }
    with running_server(command, environment, folder / "log") as server:
        client = openai.OpenAI(base_url=server.url, api_key="x", max_retries=0, timeout=120)

        def ask(prompt: list[int]) -> tuple[list[int], dict[str, int]]:
            reply: Any = client.completions.create(
                model="recall", prompt=prompt, temperature=0, max_tokens=DECODED,
                extra_body={
                    "return_token_ids": True, "ignore_eos": True,
                    "vllm_xargs": {"kvplug_usage": 1},
                },
            )  # fmt: skip
            return reply.choices[0].token_ids, reply.usage.kvplug

        with ThreadPoolExecutor(4) as pool:
            tokens, usage = zip(*pool.map(ask, prompts), strict=True)
        status = httpx.get(f"{server.url}/kvplug/status", timeout=60).json()
        return Replies(list(tokens), list(usage), status["workers"])


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> list[NeedlePrompt]:
    return [needle_prompt(tokenizer, 2500 + 90 * n, 0.1 * n, 60 + n) for n in range(8)]


def check(workers: list[dict[str, Any]], places: list[tuple[int, int]]) -> None:
    """Every worker of every engine answers, and retrieves in both layers."""
    assert [(worker["engine"], worker["rank"]) for worker in workers] == places
    assert all(worker["retrieving_layers"] == 2 for worker in workers)
    assert all(worker["selection"]["sparse_windows"] > 0 for worker in workers)


def total(counts: Sequence[dict[str, int]], field: str) -> int:
    return sum(each[field] for each in counts)


def test_tensor_parallel_workers_answer_as_whole_ones(
    recall_model: str, tokenizer: Any, asked: list[NeedlePrompt], tmp_path_factory: Any
) -> None:
    """Two halves of an engine against two whole engines."""
    prompts = [prompt.token_ids for prompt in asked]
    folder = tmp_path_factory.mktemp
    whole = replies(recall_model, prompts, ["--data-parallel-size", "2"], folder("data"))
    check(whole.workers, [(0, 0), (1, 0)])
    for field in ("sparse_tokens", "sparse_windows", "pages_attended", "pages_available"):
        counted = [worker["selection"] for worker in whole.workers]
        assert total(whole.usage, field) == total(counted, field) > 0
    for prompt, tokens in zip(asked, whole.tokens, strict=True):
        assert len(tokens) == DECODED
        assert tokenizer.decode(tokens).strip().startswith(prompt.expected)
    halves = replies(recall_model, prompts, ["--tensor-parallel-size", "2"], folder("tensor"))
    check(halves.workers, [(0, 0), (0, 1)])
    assert halves.tokens == whole.tokens
    # The first worker tells, and it has half of the KV heads.
    for mine, both in zip(halves.usage, whole.usage, strict=True):
        assert mine["dense_tokens"] == both["dense_tokens"]
        assert mine["sparse_windows"] == both["sparse_windows"]
        assert 2 * mine["pages_attended"] == both["pages_attended"]
        assert 2 * mine["pages_available"] == both["pages_available"]
