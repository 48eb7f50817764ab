"""Tensor and data parallelism: as many workers as cores here, and the answers of one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from kvplug.machine import engine_environment
from kvplug.models.documents import needle_prompt
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
    bound = "|".join(str(cores[n % len(cores)]) for n in range(2 if flags else 1))
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
def prompts(tokenizer: Any) -> list[list[int]]:
    return [needle_prompt(tokenizer, 2500 + 90 * n, 0.1 * n, 60 + n).token_ids for n in range(8)]


@pytest.fixture(scope="module")
def alone(recall_model: str, prompts: list[list[int]], tmp_path_factory: Any) -> list[list[int]]:
    """By one worker."""
    found, workers = replies(recall_model, prompts, [], tmp_path_factory.mktemp("alone"))
    assert len(workers) == 1
    assert all(len(tokens) == DECODED for tokens in found)
    return found


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--data-parallel-size"])
def test_two_workers_answer_as_one(
    flag: str, recall_model: str, prompts: list[list[int]], alone: list[list[int]], tmp_path: Any
) -> None:
    found, workers = replies(recall_model, prompts, [flag, "2"], tmp_path)
    assert found == alone
    assert all(worker["selection"]["sparse_windows"] > 0 for worker in workers)
    assert all(worker["retrieving_layers"] == 2 for worker in workers)
    if flag == "--tensor-parallel-size":
        assert [worker["rank"] for worker in workers] == [0, 1]
