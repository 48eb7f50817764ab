"""``/v1/kvplug/``: what is live, with which options, and what a traced request retrieved.

An endpoint plugin of vLLM's own kind (``vllm.endpoint_plugins``), so the routes are part of its
server and behind the same API key. vLLM loads such plugins only where ``VLLM_PLUGINS`` names them;
``kvplug serve`` does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from starlette.concurrency import run_in_threadpool

from kvplug.selection import is_selected, options_of

VARIABLE = "VLLM_PLUGINS"
ENDPOINTS = "vllm.endpoint_plugins"
GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
"""Groups that vLLM loads whole unless the variable names some of their plugins."""

router = APIRouter(prefix="/v1/kvplug", tags=["kvplug"])


def allow_endpoints() -> None:
    """Names every installed plugin to vLLM, which then loads kvplug's endpoints too.

    Where the user named some, the user's list stands. Where that would let in the endpoints of
    another package, vLLM is left to its own rule, and says in its log that none are loaded.
    """
    if VARIABLE in os.environ:
        return
    names = {plugin.name for group in GROUPS for plugin in entry_points(group=group)}
    others = {plugin.name for plugin in entry_points(group=ENDPOINTS)} - {"kvplug"}
    if not names & others:
        os.environ[VARIABLE] = ",".join(sorted(names | {"kvplug"}))


class KvplugEndpoints:
    """The plugin; see vLLM's ``EndpointPlugin``."""

    name = "kvplug"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keeps the engine for the routes."""
        state.kvplug_engine = engine_client


def _engine(request: Request) -> Any:
    """The engine of a server that serves kvplug.

    Raises:
        HTTPException: 404, it does not.
    """
    engine = request.app.state.kvplug_engine
    if engine is None or not is_selected(engine.vllm_config):
        raise HTTPException(404, "This server does not run kvplug's attention backend.")
    return engine


@router.get("/config", responses={404: {"description": "kvplug is not selected"}})
async def config(request: Request) -> dict[str, Any]:
    """The engine's options, defaults filled in, and its page size in tokens."""
    vllm_config = _engine(request).vllm_config
    options = options_of(vllm_config).model_dump()
    return {"options": options, "page": vllm_config.cache_config.block_size}


@router.get("/status", responses={404: {"description": "kvplug is not selected"}})
async def status(request: Request) -> dict[str, Any]:
    """Versions, and of each worker: its engine, layers, bytes, and what it counted so far."""
    from kvplug.patches.apply import vllm_version

    engine = _engine(request)
    return {
        "kvplug": version("kvplug"),
        "vllm": vllm_version(),
        "data_parallel_size": engine.vllm_config.parallel_config.data_parallel_size,
        "workers": await _workers(engine.engine_core),
    }


async def _workers(client: Any) -> list[dict[str, Any]]:
    """What every worker of every engine that this server sends requests to says of itself.

    Args:
        client: vLLM's ``AsyncMPClient``; its own ``collective_rpc`` returns one engine's answers.
    """
    call = ("kvplug_status", None, (), None)
    answers = await client.call_utility_all_async("collective_rpc", *call)
    return [
        {"engine": rank, **worker}
        for rank, workers in zip(client.engine_ranks_managed, answers, strict=True)
        for worker in workers
    ]


@router.get(
    "/traces/{name}",
    responses={404: {"description": "kvplug is not selected, traces nothing, or not this request"}},
)
async def trace(request: Request, name: str) -> dict[str, Any]:
    """What a request retrieved, by the id of its response."""
    path = options_of(_engine(request).vllm_config).trace
    if path is None:
        raise HTTPException(404, "This server traces nothing: start it with --trace FILE.")
    found = await run_in_threadpool(lambda: list(lines_of(Path(path), name)))
    if not any(line["kind"] == "request" for line in found):
        raise HTTPException(404, f"The trace has no request {name!r}.")
    return {"lines": found}


def lines_of(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """The first line of a trace, and those of the requests that a response's id stands for.

    vLLM appends to that id the number of the prompt and a few random letters.
    """
    written = json.dumps(name)[1:-1]
    with path.open(encoding="utf-8") as file:
        for text in file:
            if not text.endswith("\n"):
                return  # still being written
            if '"kind":"window"' in text and written not in text:
                continue  # another request's: not worth parsing
            line = json.loads(text)
            mine = str(line.get("request", name))
            if mine == name or mine.startswith(f"{name}-"):
                yield line
