"""The OpenAI server through ``kvplug serve``: it answers, refuses politely, and stays up."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvplug
from kvplug.machine import engine_environment
from kvplug.models.documents import needle_prompt
from kvplug.observe import pool_metrics
from kvplug.serve.server import running_server

pytestmark = pytest.mark.engine
LONGEST = 6144
KEY = "secret"


@pytest.fixture(scope="module")
def client(
    recall_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[openai.OpenAI, Any]]:
    """A client of a running server, and the server's log."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        "-m", "kvplug", "serve", recall_model, "--policy", "simhash", "--budget", "256",
        "--dense-below", "1024", "--audit", "0.5", "--trace", str(log.with_name("trace.jsonl")),
        "--api-key", KEY, "--enable-prompt-tokens-details",
        "--max-model-len", str(LONGEST), "--block-size", "32", "--served-model-name", "recall",
        "--dtype", "bfloat16", "--enforce-eager",
    ]  # fmt: skip
    with running_server(command, engine_environment(2, in_process=False), log) as server:
        yield openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=120), log


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


def ask(client: Any, prompt: Any, **knobs: Any) -> Any:
    """A chat completion of a prompt, with request options."""
    return client[0].chat.completions.create(
        model="recall", messages=prompt.messages(), temperature=0, max_tokens=16,
        extra_body={"vllm_xargs": knobs},
    )  # fmt: skip


def read(client: Any, path: str, key: str = KEY) -> httpx.Response:
    """A page of the server, below its root."""
    root = str(client[0].base_url).removesuffix("v1/")
    return httpx.get(root + path, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def samples_of(text: str) -> dict[str, float]:
    """Samples of a page in Prometheus's format, by name and labels' values."""
    return {
        f"{sample.name} {','.join(sample.labels.values())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"kvplug_budget": 0}, "greater than 0"),
        ({"kvplug_budget": 31}, "at least one page of 32"),
        ({"kvplug_budget": LONGEST + 1}, f"at most {LONGEST}"),
        ({"kvplug_budget": "many"}, "valid integer"),
        ({"kvplug_budget": 64, "kvplug_dense": True}, "exclude each other"),
        ({"kvplug_usage": "perhaps"}, "kvplug_usage='perhaps'"),
        ({"kvplug_bugdet": 64}, "did you mean 'kvplug_budget'"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(client, tokenizer, knobs, sentence):
    with pytest.raises(openai.BadRequestError, match=sentence):
        ask(client, needle_prompt(tokenizer, 2000, depth=0.3, seed=8), **knobs)


def test_a_request_may_have_a_budget_of_its_own(client, tokenizer):
    """And shares cached pages with requests of the same budget only."""
    prompt = needle_prompt(tokenizer, 4000, depth=0.4, seed=11)
    cached = []
    for knobs in ({}, {}, {"kvplug_budget": 512}, {"kvplug_budget": 512}, {"kvplug_dense": 1}):
        reply = ask(client, prompt, **knobs)
        assert reply.choices[0].message.content.strip() == prompt.expected
        cached.append(reply.usage.prompt_tokens_details.cached_tokens)
    assert [bool(tokens) for tokens in cached] == [False, True, False, True, False]


def test_status_and_config_are_behind_the_key(client):
    assert read(client, "v1/kvplug/status", "wrong").status_code == 401
    config = read(client, "v1/kvplug/config").json()
    assert config["page"] == 32
    assert config["options"]["policy"] == "simhash"
    assert config["options"]["window"] == 256
    status = read(client, "v1/kvplug/status").json()
    assert status["data_parallel_size"] == 1
    [worker] = status["workers"]
    assert worker["engine"] == worker["rank"] == 0
    assert worker["retrieving_layers"] == 2
    assert worker["index_bytes"] * 64 == pytest.approx(worker["kv_bytes"], rel=0.05)
    assert worker["pool"] is None
    assert (worker["pool_bytes"], worker["buffer_bytes"] > 0) == (0, True)


def selection(client: Any) -> dict[str, int]:
    """What the worker counted so far."""
    found: dict[str, int] = read(client, "v1/kvplug/status").json()["workers"][0]["selection"]
    return found


def test_what_is_counted_reaches_metrics(client, tokenizer):
    before = selection(client)
    ask(client, needle_prompt(tokenizer, 3000, depth=0.4, seed=12))
    after = selection(client)
    new = {name: after[name] - before[name] for name in after}
    # The prompt is dense up to 1,024 tokens, and the answer's tokens are all sparse.
    assert new["dense_tokens"] == 1024
    assert 3000 - 1024 <= new["sparse_tokens"] < 3000 - 1024 + 16
    assert 0 < new["pages_attended"] < new["pages_available"]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        samples = samples_of(read(client, "metrics").text)
        if samples.get("kvplug:query_tokens_total sparse") == after["sparse_tokens"]:
            break
        time.sleep(0.2)
    assert samples["kvplug:query_tokens_total dense"] == after["dense_tokens"]
    assert samples["kvplug:pages_attended_total "] == after["pages_attended"]
    audited = samples["kvplug:audit_captured_mass_count 0"]
    assert audited == pytest.approx(after["sparse_windows"] / 2, abs=1)
    assert samples["kvplug:audit_seconds_total "] > 0


def test_a_trace_shows_where_the_answer_came_from(client, tokenizer):
    """The page of the needle is among those that the answer's first token selected."""
    prompt = needle_prompt(tokenizer, 4500, depth=0.5, seed=13)
    reply = ask(client, prompt)
    head, *lines = read(client, f"v1/kvplug/traces/{reply.id}").json()["lines"]
    assert head["kind"] == "head"
    assert head["page"] == 32
    [request] = [line for line in lines if line["kind"] == "request"]
    text = tokenizer.decode(request["tokens"])
    assert text.endswith(tokenizer.decode(prompt.token_ids)[-40:])
    answer = tokenizer.encode(" " + prompt.expected.split()[0], add_special_tokens=False)[-1:]
    assert answer[0] in request["tokens"]
    windows = [line for line in lines if line["kind"] == "window"]
    assert {line["layer"] for line in windows} == {0, 1}
    place = max(n for n, token in enumerate(request["tokens"]) if token == answer[0]) // 32
    asking = [line for line in windows if line["end"] == len(request["tokens"])]
    assert any(place in pages for line in asking for pages in line["selected"])
    assert read(client, "v1/kvplug/traces/nobody").status_code == 404


def test_every_metric_of_the_dashboard_exists(client):
    dashboard = (Path(kvplug.__file__).parent / "serve" / "dashboards" / "kvplug.json").read_text()
    asked = set(re.findall(r"(?:kvplug|vllm):\w+", dashboard))
    exported = {name.split()[0] for name in samples_of(read(client, "metrics").text)}
    # Pools are counted where there is one; tests of offloading read their counters.
    exported |= {f"{metric.name}_total" for metric in pool_metrics.METRICS}
    assert len(asked) > 20
    assert asked <= exported
