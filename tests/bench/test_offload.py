"""The cells of ``kvplug bench offload``: caches that an engine would not refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvplug.bench import offload
from kvplug.bench.job import STOCK, Job
from kvplug.config import KvplugConfig


@pytest.mark.parametrize(("context", "many"), [(4096, (2, 1024)), (131072, (8, 65536))])
def test_every_cache_is_as_large_as_its_pool(
    context: int, many: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crowd that is small beside the least memory of vLLM's has a cache that holds the pool."""
    jobs: list[tuple[str, Job]] = []

    def run(cell: str, cache: str, job: Job, say: Callable[[str], None]) -> list[dict[str, Any]]:
        jobs.append((cell, job))
        speeds = {"ttft_s": 2.0, "decode_tok_s": 10.0, "total_s": 4.0}
        return [{"cell": cell, "cache": cache, "context_tokens": 1, "batch": 1, **speeds}]

    monkeypatch.setattr(offload, "_run", run)
    job = Job("simhash", "recall", [context], [1], 1, 32, 4096, 16, False, 0)
    rows: list[dict[str, Any]] = []
    offload.measure(job, tmp_path, many, lambda _: None, rows)
    assert [row["decode_ratio"] for row in rows] == [1.0] * 8
    assert [cell for cell, _ in jobs] == ["near"] * 3 + ["far"] * 3 + ["many"] * 2
    for _, each in jobs:
        config = KvplugConfig.parse(each.options)
        if config.offload is not None:
            assert config.offload.cold_gib >= config.offload.hot_gib
    assert jobs[-2][1].policy == STOCK
