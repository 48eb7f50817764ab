"""A server under clients that break off and bodies without sense: nothing leaks, nothing falls.

``KVPLUG_BODIES`` sets how many malformed bodies are sent.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from kvplug.loadtests.scrape import values_of
from kvplug.machine import engine_environment
from kvplug.models.documents import needle_prompt
from kvplug.serve.server import running_server

pytestmark = pytest.mark.engine
CLIENTS = 200
AT_ONCE = 40
BODIES = int(os.environ.get("KVPLUG_BODIES", "1000"))
LONGEST = 4096


class Running(NamedTuple):
    url: str
    pid: int
    log: Path


@pytest.fixture(scope="module")
def server(recall_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With the cache on a disk, where there is most to leak."""
    folder = tmp_path_factory.mktemp("abused")
    offload = {"tier": "disk", "path": str(folder), "hot_gib": 0.03, "cold_gib": 0.5}
    command = [
        "-m", "kvplug", "serve", recall_model, "--budget", "256", "--dense-below", "512",
        "--offload", json.dumps(offload), "--max-model-len", str(LONGEST),
        "--served-model-name", "recall", "--dtype", "bfloat16", "--enforce-eager",
    ]  # fmt: skip
    log = folder / "log"
    with running_server(command, engine_environment(2, in_process=False), log) as found:
        yield Running(found.url, found.pid, log)


def descriptors(pid: int) -> int:
    """Open files of a server and its children."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.num_fds() for process in family)


def settled(server: Running) -> dict[str, float]:
    """What the server says once no request runs or waits."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = values_of(httpx.get(f"{server.url[:-3]}/metrics", timeout=30).text)
        if found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0:
            return found
        time.sleep(0.2)
    raise AssertionError("requests of clients that are gone still run")


def answers(server: Running, tokenizer: Any) -> None:
    """The server still finds a needle."""
    prompt = needle_prompt(tokenizer, 3000, depth=0.4, seed=77)
    body = {"model": "recall", "messages": prompt.messages(), "max_tokens": 12, "temperature": 0}
    reply = httpx.post(f"{server.url}/chat/completions", json=body, timeout=120).json()
    assert reply["choices"][0]["message"]["content"].strip() == prompt.expected


def break_off(server: Running, prompt: list[int], seed: int) -> None:
    """Begins to read a stream and leaves: before the first token, after some, or in a reply."""
    draw = random.Random(seed)
    chunks = draw.choice((0, 1, 2, 5))
    body = {"model": "recall", "prompt": prompt, "max_tokens": 400, "stream": True,
            "ignore_eos": True}  # fmt: skip
    if draw.random() < 0.5:
        body |= {"vllm_xargs": {"kvplug_usage": 1}, "stream_options": {"include_usage": True}}
    timeout = httpx.Timeout(60, read=draw.choice((0.05, 0.5, 60)))
    with (
        suppress(httpx.TransportError),
        httpx.stream("POST", f"{server.url}/completions", json=body, timeout=timeout) as stream,
    ):
        for n, _ in enumerate(stream.iter_lines()):
            if n >= chunks:
                break


def test_clients_that_break_off_leave_nothing(server: Running, tokenizer: Any) -> None:
    prompts = [needle_prompt(tokenizer, 1200, 0.5, seed).token_ids for seed in range(8)]
    with ThreadPoolExecutor(AT_ONCE) as pool:  # connections and threads of the server's own
        list(pool.map(lambda n: break_off(server, prompts[n % 8], n), range(AT_ONCE)))
    settled(server)
    before = descriptors(server.pid)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda n: break_off(server, prompts[n % 8], 1000 + n), range(CLIENTS)))
    found = settled(server)
    assert found["vllm:kv_cache_usage_perc"] == 0
    deadline = time.monotonic() + 30
    while descriptors(server.pid) > before + 5 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert descriptors(server.pid) <= before + 5
    assert threading.active_count() < AT_ONCE
    answers(server, tokenizer)


VALID: dict[str, Any] = {
    "model": "recall", "prompt": "the old lighthouse is", "max_tokens": 2, "temperature": 0.0,
    "vllm_xargs": {"kvplug_budget": 64, "kvplug_usage": 1},
}  # fmt: skip
NONSENSE: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, -(2**40), 1e308, -0.5, "", "x", "0", "\x00",
    "é" * 50, [], [[]], [1, 2, 3], [-1], [10**9], ["a", 1], {}, {"a": {"b": [None]}}, "a " * 6000,
]  # fmt: skip
# Not structured_outputs: vLLM 0.32 itself answers 500 where that is no object.
FIELDS = [
    *VALID, "n", "stop", "stream", "stream_options", "logprobs", "logit_bias", "seed", "top_p",
    "top_k", "echo", "best_of", "min_tokens", "prompt_logprobs", "response_format", "cache_salt",
    "truncate_prompt_tokens", "stop_token_ids", "bad_words", "allowed_token_ids", "priority",
    "user", "suffix", "repetition_penalty", "nonsense",
]  # fmt: skip
KNOBS = ["kvplug_budget", "kvplug_dense", "kvplug_usage", "kvplug_", "kvplug_nonsense", "other"]


def malformed(seed: int) -> bytes:
    """A body with something wrong with it, most likely."""
    draw = random.Random(seed)
    body = dict(VALID)
    for _ in range(draw.randint(1, 3)):
        kind = draw.random()
        if kind < 0.5:
            body[draw.choice(FIELDS)] = draw.choice(NONSENSE)
        elif kind < 0.8:
            body["vllm_xargs"] = {draw.choice(KNOBS): draw.choice(NONSENSE) for _ in range(2)}
        else:
            body.pop(draw.choice(list(body)), None)
    # Few and short answers, and no stream: what happens to be valid must not take long.
    for limit in ("n", "best_of", "max_tokens", "min_tokens"):
        if isinstance(body.get(limit), (int, float)) and body[limit] > 4:
            body[limit] = draw.choice([-1, 0, 3])
    text = json.dumps(body).encode()
    damage = draw.random()
    if damage < 0.05:
        return text[: draw.randrange(len(text))]
    if damage < 0.1:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    return text


def test_bodies_without_sense_are_the_client_s_fault(server: Running, tokenizer: Any) -> None:
    statuses: Counter[int] = Counter()
    wrong: list[tuple[int, str, bytes]] = []
    with httpx.Client(timeout=120, headers={"content-type": "application/json"}) as client:

        def send(seed: int) -> None:
            body = malformed(seed)
            reply = client.post(f"{server.url}/completions", content=body)
            statuses[reply.status_code] += 1
            if reply.status_code >= 500:
                wrong.append((reply.status_code, reply.text[:300], body[:300]))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, range(BODIES)))
    assert not wrong, f"{len(wrong)} of {BODIES}: {wrong[:5]}"
    assert statuses[400] > BODIES / 4
    assert settled(server)["vllm:kv_cache_usage_perc"] == 0
    answers(server, tokenizer)
