"""``kvplug demo``: one document, one question, two real servers."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from kvplug.attended import attended_share
from kvplug.errors import KvplugError
from kvplug.machine import engine_environment, num_threads, versions
from kvplug.policies import check

if TYPE_CHECKING:
    from kvplug.models.documents import NeedlePrompt

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


@dataclass(frozen=True)
class OffloadedRun(Run):
    """An answer by a server whose cache is on a disk."""

    kv_gib: float
    """Of the document's keys and values."""
    bytes_read_gib: float
    """Copied back from the cold store."""
    peak_rss_gib: float
    """The engine process's, mapped pages included."""
    engine_rss_gib: float
    """What it held before the question, when it had served a prompt that retrieves nothing."""
    kv_memory_gib: float
    """Of hot pool, index and buffers: what kvplug keeps in memory for the document's KV."""


def demo(
    context: int, policy: str, budget: int, say: Callable[[str], None],
    tier: str | None = None, folder: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Asks stock vLLM and kvplug the same question about the same document.

    Args:
        context: Length of the prompt in tokens.
        policy: Recipe.
        budget: Far tokens per window and KV head.
        say: Told what is going on.
        tier: ``disk``: kvplug's cache is on a disk, and stock vLLM is not asked.
        folder: Where on the disk; None for the temporary folder.

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
    # As long as a step of the question's, so that what vLLM needs for one is there before it.
    warm_up = needle_prompt(tokenizer, min(CHUNK, config.dense_below, context), depth=0.5, seed=8)
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
    runs: dict[str, Run | None] = {"dense": None}
    with tempfile.TemporaryDirectory(prefix="kvplug-", dir=folder) as cold:
        if tier is not None:
            del commands["dense"]
            options = cold_options(model, context, cold)
            check({"policy": policy, "budget": budget, "offload": options})
            commands["kvplug"] += ["--offload", json.dumps(options)]
        for name, command in commands.items():
            say(f"{name}: starting its server")
            run = runs[name] = _ask(
                name, command, (warm_up, prompt), context, say, tier is not None
            )
            say(f"{name}: {run.answer!r}, first token after {run.ttft_s:.2f} s")
    dense, ours = runs["dense"], runs["kvplug"]
    assert ours is not None
    return {
        "context_tokens": context,
        "question": prompt.question,
        "expected": prompt.expected,
        "runs": {name: None if run is None else asdict(run) for name, run in runs.items()},
        "ttft_ratio": None if dense is None else dense.ttft_s / ours.ttft_s,
        "decode_ratio": None if dense is None else ours.decode_tok_s / dense.decode_tok_s,
        "pages_attended_share": attended_share(config, PAGE, context, 0),
        "threads": num_threads(),
        "versions": versions(),
    }


def kv_gib(model: Path, tokens: int) -> float:
    """GiB of the keys and values of some tokens, in bfloat16."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * numbers * tokens / 2**30


def cold_options(model: Path, context: int, folder: str) -> dict[str, Any]:
    """``offload`` for a document: a thirty-second of its cache is hot."""
    size = kv_gib(model, context + 4096)
    return {"tier": "disk", "path": folder, "cold_gib": 1.1 * size, "hot_gib": max(size / 32, 0.05)}


def longest_context(model: Path) -> int:
    """Positions that ``model`` was made for."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).max_position_embeddings)


def _ask(
    name: str, command: list[str], prompts: tuple[NeedlePrompt, NeedlePrompt], context: int,
    say: Callable[[str], None], is_offloaded: bool,
) -> Run:  # fmt: skip
    """Starts a server, warms it up by one prompt, asks another, measures, stops it."""
    from openai import OpenAI

    from kvplug.serve.server import running_server

    kv_space = max(2, context * 2 // 2**18 + 1)
    environment = engine_environment(kv_space, in_process=False)
    if name == "dense":
        environment["VLLM_PLUGINS"] = ""  # stock vLLM: no plugin is even loaded
    with (
        tempfile.TemporaryDirectory(prefix="kvplug-") as folder,
        running_server(command, environment, Path(folder) / f"{name}.log") as server,
    ):
        client = OpenAI(base_url=server.url, api_key="none", timeout=3600, max_retries=0)
        warm_up, prompt = prompts
        _stream(client, warm_up.messages(), 4, False)
        say(f"{name}: asking")
        before = rss_gib(server.pid, "VmRSS") if is_offloaded else 0.0
        if is_offloaded:
            reset_peaks(server.pid)
        answer, times = _stream(client, prompt.messages(), 32, False)
        # The prompt is in the prefix cache now, so a second request is nearly all decoding.
        _, decoded = _stream(client, prompt.messages(), DECODED, True)
        if is_offloaded:
            peak, read = rss_gib(server.pid, "VmHWM"), cold_read_gib(server.url)
            ours = kv_memory_gib(server.url)
    gaps = [later - earlier for earlier, later in itertools.pairwise(decoded[1:])]
    run = Run(
        answer.strip(), answer.strip() == prompt.expected, times[1] - times[0],
        1 / statistics.median(gaps),
    )  # fmt: skip
    if not is_offloaded:
        return run
    model = Path(command[command.index("serve") + 1])
    return OffloadedRun(**asdict(run), kv_gib=kv_gib(model, context), bytes_read_gib=read,
                        peak_rss_gib=peak, engine_rss_gib=before, kv_memory_gib=ours)  # fmt: skip


def rss_gib(pid: int, field: str) -> float:
    """Resident memory of the largest process among a server's, the engine's.

    Args:
        pid: The server's.
        field: Of ``/proc/PID/status``: ``VmRSS`` now, or ``VmHWM``, the most since it was reset.
    """
    return max(_status_gib(process, field) for process in _family(pid))


def reset_peaks(pid: int) -> None:
    """Lets the peaks of a server's processes start anew (proc(5), ``clear_refs``)."""
    for process in _family(pid):
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def _family(pid: int) -> list[psutil.Process]:
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]


def _status_gib(process: psutil.Process, field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return int(found.group(1)) / 2**20 if found else 0.0


def cold_read_gib(url: str) -> float:
    """What a server says it read from its cold store."""
    import httpx

    from kvplug.loadtests.scrape import values_of

    text = httpx.get(f"{url.removesuffix('/v1')}/metrics", timeout=60).text
    return values_of(text).get("kvplug:cold_read_bytes_total", 0.0) / 2**30


def kv_memory_gib(url: str) -> float:
    """What a server's worker says that it keeps in memory for KV: hot pool, index and buffers."""
    import httpx

    status = httpx.get(f"{url}/kvplug/status", timeout=60).json()
    parts = ("pool_bytes", "index_bytes", "buffer_bytes")
    return sum(worker[part] for worker in status["workers"] for part in parts) / 2**30


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
