"""``kvplug demo``: one document, one question, two real servers."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvplug.attended import attended_share
from kvplug.errors import KvplugError
from kvplug.machine import engine_environment, num_threads, versions
from kvplug.policies import check

PAGE = 32
CHUNK = 4096
"""Prompt tokens per step, for both servers."""
DECODED = 96
"""Tokens over which decode speed is taken."""
MIN_CONTEXT = 1024


@dataclass(frozen=True)
class Run:
    """One server's answer."""

    answer: str
    correct: bool
    ttft_s: float
    """Seconds from sending the request to the first token."""
    decode_tok_s: float
    """Tokens per second after it."""


def demo(context: int, policy: str, budget: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Asks stock vLLM and kvplug the same question about the same document.

    Args:
        context: Length of the prompt in tokens.
        policy: Recipe.
        budget: Far tokens per window and KV head.
        say: Told what is going on.

    Returns:
        The JSON object of the public interface.

    Raises:
        KvplugError: Bad options, or a server that does not start.
    """
    from transformers import AutoTokenizer

    from kvplug.models.documents import needle_prompt
    from kvplug.models.recall import recall_model_path

    options = {"policy": policy, "budget": budget}
    config = check(options)
    config.check_page(PAGE)
    if context < MIN_CONTEXT:
        raise KvplugError(
            f"--context {context} is too short for a document: use {MIN_CONTEXT} or more."
        )
    say("building the recall model and the document")
    model = recall_model_path()
    tokenizer = AutoTokenizer.from_pretrained(model)
    longest = longest_context(model)
    if context + DECODED > longest:
        raise KvplugError(
            f"--context {context} is longer than the model's {longest} positions allow."
        )
    prompt = needle_prompt(tokenizer, context, depth=0.35, seed=7)
    flags = [
        "--max-model-len", str(context + 2 * DECODED), "--block-size", str(PAGE),
        "--max-num-batched-tokens", str(CHUNK), "--served-model-name", "recall",
        "--dtype", "bfloat16", "--enforce-eager", "--max-num-seqs", "8",
    ]  # fmt: skip
    commands = {
        "dense": ["-m", "kvplug.serve.launch", "serve", str(model), *flags],
        "kvplug": ["-m", "kvplug", "serve", str(model), "--policy", policy, "--budget", str(budget),
                   *flags],
    }  # fmt: skip
    runs = {}
    for name, command in commands.items():
        say(f"{name}: starting its server")
        runs[name] = _ask(name, command, prompt, context, say)
        say(f"{name}: {runs[name].answer!r}, first token after {runs[name].ttft_s:.2f} s")
    dense, ours = runs["dense"], runs["kvplug"]
    return {
        "context_tokens": context,
        "question": prompt.question,
        "expected": prompt.expected,
        "runs": {name: asdict(run) for name, run in runs.items()},
        "ttft_ratio": dense.ttft_s / ours.ttft_s,
        "decode_ratio": ours.decode_tok_s / dense.decode_tok_s,
        "pages_attended_share": attended_share(config, PAGE, context, 0),
        "threads": num_threads(),
        "versions": versions(),
    }


def longest_context(model: Path) -> int:
    """Positions that ``model`` was made for."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).max_position_embeddings)


def _ask(
    name: str, command: list[str], prompt: Any, context: int, say: Callable[[str], None]
) -> Run:
    """Starts a server, asks once, measures, stops it."""
    from openai import OpenAI

    from kvplug.serve.server import running_server

    kv_gib = max(2, context * 2 // 2**18 + 1)
    environment = engine_environment(kv_gib, in_process=False)
    if name == "dense":
        environment["VLLM_PLUGINS"] = ""  # stock vLLM: no plugin is even loaded
    with (
        tempfile.TemporaryDirectory(prefix="kvplug-") as folder,
        running_server(command, environment, Path(folder) / f"{name}.log") as url,
    ):
        client = OpenAI(base_url=url, api_key="none", timeout=3600, max_retries=0)
        _stream(client, [{"role": "user", "content": "What is warm?"}], 4, False)
        say(f"{name}: asking")
        answer, times = _stream(client, prompt.messages(), 32, False)
        # The prompt is in the prefix cache now, so a second request is nearly all decoding.
        _, decoded = _stream(client, prompt.messages(), DECODED, True)
    gaps = [later - earlier for earlier, later in itertools.pairwise(decoded[1:])]
    correct = answer.strip() == prompt.expected
    return Run(answer.strip(), correct, times[1] - times[0], 1 / statistics.median(gaps))


def _stream(
    client: Any, messages: list[dict[str, str]], tokens: int, ignore_eos: bool
) -> tuple[str, list[float]]:
    """One streamed chat completion: the text, and the time of sending and of every token."""
    times = [time.perf_counter()]
    parts = []
    stream = client.chat.completions.create(
        model="recall", messages=messages, max_tokens=tokens, temperature=0, stream=True,
        extra_body={"ignore_eos": ignore_eos},
    )  # fmt: skip
    for chunk in stream:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            parts.append(text)
            times.append(time.perf_counter())
    return "".join(parts), times
