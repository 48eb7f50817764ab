"""The OpenAI server through ``kvplug serve``: it answers, refuses politely, and stays up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from kvplug.machine import engine_environment
from kvplug.models.documents import needle_prompt
from kvplug.serve.server import running_server

pytestmark = pytest.mark.engine
LONGEST = 6144


@pytest.fixture(scope="module")
def client(
    recall_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[openai.OpenAI, Any]]:
    """A client of a running server, and the server's log."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        "-m", "kvplug", "serve", recall_model, "--policy", "simhash", "--budget", "256",
        "--dense-below", "1024",
        "--max-model-len", str(LONGEST), "--block-size", "32", "--served-model-name", "recall",
        "--dtype", "bfloat16", "--enforce-eager",
    ]  # fmt: skip
    with running_server(command, engine_environment(2, in_process=False), log) as server:
        yield openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120), log


def test_recalls_through_chat(client, tokenizer):
    prompt = needle_prompt(tokenizer, 5000, depth=0.3, seed=8)
    reply = client[0].chat.completions.create(
        model="recall", messages=prompt.messages(), temperature=0, max_tokens=16
    )
    assert reply.choices[0].message.content.strip() == prompt.expected
    assert reply.choices[0].finish_reason == "stop"


def test_log_states_policy_and_index_size(client):
    log = client[1].read_text()
    assert "kvplug is live: policy simhash, budget 256" in log
    assert "2 of 2 layers retrieve" in log
    assert "1/64 of" in log


def test_too_long_a_request_is_an_openai_error(client, tokenizer):
    prompt = needle_prompt(tokenizer, LONGEST + 100, depth=0.3, seed=8)
    with pytest.raises(openai.BadRequestError) as refused:
        client[0].chat.completions.create(model="recall", messages=prompt.messages())
    assert refused.value.status_code == 400
    fits = needle_prompt(tokenizer, 2000, depth=0.6, seed=9)
    reply = client[0].chat.completions.create(model="recall", messages=fits.messages())
    assert reply.choices[0].message.content.strip() == fits.expected
