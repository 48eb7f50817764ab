"""The servers that are compared: started here one after the other, or running already."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from kvplug.errors import KvplugError
from kvplug.loadtests.settings import Settings, check_url
from kvplug.serve.server import ENGINE_DIED, last_words, running_server

DENSE = "dense"
"""Stock vLLM, without kvplug."""
LOOK_S = 60.0


class Ready(NamedTuple):
    """A server that answers."""

    url: str
    """Up to ``/v1``."""
    model: str
    """As it calls itself."""
    trouble: Callable[[], str | None]
    """Why it can answer no more; None while it can."""
    pid: int | None = None
    """Of a server that was started here."""


@dataclass(frozen=True)
class Contender:
    """A server by its label."""

    label: str
    url: str = ""
    """Where it runs already; empty: it is started."""
    command: list[str] = field(default_factory=list)
    """Arguments of Python that start it."""
    environment: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def ready(self, log: Path | None, key: str) -> Iterator[Ready]:
        """The server while the context lasts.

        Args:
            log: Takes what it prints; for one that is started.
            key: API key.

        Raises:
            KvplugError: It does not start, or serves no model.
        """
        if self.url:
            yield Ready(self.url, _model(self.url, key), lambda: None)
            return
        assert log is not None
        with running_server(self.command, self.environment, log) as server:
            url = check_url(server.url, is_given=False)
            yield Ready(url, _model(url, key), lambda: _trouble(server.pid, log), server.pid)


def _trouble(pid: int, log: Path) -> str | None:
    """What is wrong with a server that was started here."""
    try:
        is_gone = psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        is_gone = True
    if is_gone:
        return f"the server died: {last_words(log)}"
    if ENGINE_DIED in log.read_text(errors="replace"):
        return f"the server's engine died: {last_words(log)}"
    return None


def _model(url: str, key: str) -> str:
    """The first model that a server lists.

    Raises:
        KvplugError: It cannot be reached, or lists none.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.get(f"{url}/models", headers=headers, timeout=LOOK_S, trust_env=False)
        reply.raise_for_status()
        return str(reply.json()["data"][0]["id"])
    except httpx.TransportError:
        raise KvplugError(f"{url} cannot be reached.") from None
    except httpx.HTTPStatusError as error:
        raise KvplugError(f"{url}/models answered {error.response.status_code}.") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise KvplugError(f"{url} lists no model.") from None


class Serving(NamedTuple):
    """How servers are started, all alike."""

    model: str
    """A checkpoint, or a bundled model's name."""
    budget: int
    page: int
    chunk: int
    eager: bool
    flags: Sequence[str]
    """Others, of ``vllm serve``."""


def started(names: Sequence[str], settings: Settings, serving: Serving) -> list[Contender]:
    """Contenders that are started: stock vLLM, or recipes of kvplug's.

    Raises:
        KvplugError: Unknown recipe, bad options, or prompts longer than the model takes.
    """
    from kvplug.bench.engine import model_path
    from kvplug.demo import kv_gib, longest_context
    from kvplug.machine import engine_environment
    from kvplug.policies import check

    for name in names:
        if name != DENSE:
            check({"policy": name, "budget": serving.budget}).check_page(serving.page)
    model = Path(model_path(serving.model))
    most = settings.longest + settings.output_tokens + 256
    if most > longest_context(model):
        raise KvplugError(
            f"Prompts of {settings.longest} tokens and answers are longer than the model's "
            f"{longest_context(model)} positions allow."
        )
    at_once = min(max(phase.peak for phase in settings.phases()), 16) if _closed(settings) else 16
    space = min(math.ceil(kv_gib(model, int(most * at_once))) + 1, _half_of_memory_gib())
    environment = engine_environment(space, in_process=False)
    flags = [
        "--max-model-len", str(most), "--block-size", str(serving.page), "--dtype", "bfloat16",
        "--max-num-batched-tokens", str(serving.chunk), "--served-model-name", serving.model,
        "--enable-prompt-tokens-details", *(["--enforce-eager"] if serving.eager else []),
        *serving.flags,
    ]  # fmt: skip
    found = []
    for name in dict.fromkeys(names):
        start = ["-m", "kvplug", "serve", str(model), "--policy", name, "--budget",
                 str(serving.budget), *flags]  # fmt: skip
        if name == DENSE:
            start = ["-m", "kvplug.serve.launch", "serve", str(model), *flags]
        # Stock vLLM loads no plugin at all.
        mine = {**environment, "VLLM_PLUGINS": ""} if name == DENSE else environment
        found.append(Contender(name, command=start, environment=mine))
    return found


def _closed(settings: Settings) -> bool:
    return settings.loop == "closed"


def _half_of_memory_gib() -> int:
    return max(1, int(psutil.virtual_memory().total / 2**31))


def running(urls: Sequence[str]) -> list[Contender]:
    """Contenders that run already: ``URL`` or ``LABEL=URL``.

    Raises:
        KvplugError: One is not a URL, or two have one label.
    """
    found: dict[str, Contender] = {}
    for text in urls:
        label, equals, url = text.partition("=")
        if not equals or label.startswith("http"):
            label, url = f"server {len(found) + 1}" if len(urls) > 1 else "server", text
        if label in found:
            raise KvplugError(f"Two servers are called {label!r}: give each --url a label.")
        found[label] = Contender(label, url=check_url(url, is_given=True))
    return list(found.values())
