"""Tensor and data parallelism: as many workers as cores here, and the answers of one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


def replies(
    model: str, prompts: list[list[int]], flags: list[str], folder: Any
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Greedy token ids of every prompt, and what the workers say of themselves."""
    command = ["-m", "kvplug", "serve", model, *FLAGS, *flags]
    cores = sorted(os.sched_getaffinity(0))
    bound = "|".join(str(cores[n % len(cores)]) for n in range(2))
    environment = {
        **engine_environment(1, in_process=False),
        "VLLM_CPU_OMP_THREADS_BIND": bound,  # by itself vLLM wants a NUMA node for each worker
    }
    with running_server(command, environment, folder / "log") as server:
        client = openai.OpenAI(base_url=server.url, api_key="x", max_retries=0, timeout=120)

        def tokens(prompt: list[int]) -> list[int]:
            reply = client.completions.create(
                model="recall", prompt=prompt, temperature=0, max_tokens=DECODED,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )  # fmt: skip
            found: list[int] = reply.choices[0].token_ids  # type: ignore[attr-defined]
            return found

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(tokens, prompts))
        status = httpx.get(f"{server.url}/kvplug/status", timeout=60).json()
        return found, status["workers"]


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> list[NeedlePrompt]:
    return [needle_prompt(tokenizer, 2500 + 90 * n, 0.1 * n, 60 + n) for n in range(8)]


def check(workers: list[dict[str, Any]]) -> None:
    """Every worker that was asked retrieves, in both layers."""
    assert all(worker["retrieving_layers"] == 2 for worker in workers)
    assert all(worker["selection"]["sparse_windows"] > 0 for worker in workers)


def test_tensor_parallel_workers_answer_as_whole_ones(
    recall_model: str, tokenizer: Any, asked: list[NeedlePrompt], tmp_path_factory: Any
) -> None:
    """Two halves of an engine against two whole engines."""
    prompts = [prompt.token_ids for prompt in asked]
    folder = tmp_path_factory.mktemp
    whole, workers = replies(recall_model, prompts, ["--data-parallel-size", "2"], folder("data"))
    check(workers)
    for prompt, tokens in zip(asked, whole, strict=True):
        assert len(tokens) == DECODED
        assert tokenizer.decode(tokens).strip().startswith(prompt.expected)
    halves, workers = replies(
        recall_model, prompts, ["--tensor-parallel-size", "2"], folder("tensor")
    )
    check(workers)
    assert [worker["rank"] for worker in workers] == [0, 1]
    assert halves == whole
