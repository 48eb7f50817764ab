"""``/v1/kvplug/status`` speaks for every engine that the server has."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kvplug.selection import BACKEND_PATH
from kvplug.serve.endpoints import KvplugEndpoints


class Client:
    """vLLM's client of some engines, each with as many workers."""

    def __init__(self, ranks: list[int], workers: int) -> None:
        self.engine_ranks_managed = ranks
        self._workers = workers
        self.called: list[Any] = []

    async def call_utility_all_async(self, *call: Any) -> list[list[dict[str, Any]]]:
        self.called.append(call)
        each = [{"rank": rank, "layers": 2} for rank in range(self._workers)]
        return [each for _ in self.engine_ranks_managed]


def served(client: Client, size: int, path: str | None = BACKEND_PATH) -> TestClient:
    """A server in front of some engines of ``size``."""
    backend = None if path is None else SimpleNamespace(name="CUSTOM", get_path=lambda: path)
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=backend), additional_config={},
        parallel_config=SimpleNamespace(data_parallel_size=size),
    )  # fmt: skip
    app = FastAPI()
    plugin = KvplugEndpoints()
    plugin.attach_router(app)
    engine = SimpleNamespace(vllm_config=config, engine_core=client)
    asyncio.run(plugin.init_state(engine, app.state, None))
    return TestClient(app)


@pytest.mark.parametrize(
    ("ranks", "workers", "size"), [([0], 1, 1), ([0, 1, 2], 2, 3), ([2, 3], 1, 4)]
)
def test_every_worker_of_every_engine(ranks: list[int], workers: int, size: int) -> None:
    """Of those that the server sends requests to; with a server a machine, that is not all."""
    client = Client(ranks, workers)
    said = served(client, size).get("/v1/kvplug/status").json()
    assert said["data_parallel_size"] == size
    found = [(worker["engine"], worker["rank"]) for worker in said["workers"]]
    assert found == [(engine, rank) for engine in ranks for rank in range(workers)]
    assert client.called == [("collective_rpc", "kvplug_status", None, (), None)]


def test_another_backend_has_no_status() -> None:
    assert served(Client([0], 1), 1, None).get("/v1/kvplug/status").status_code == 404
