"""Results of vLLM's own tool are read with and without their single values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.vllm_bench import read

SHORT = {
    "model_id": "m", "request_rate": "inf", "burstiness": 1.0, "max_concurrency": None,
    "duration": 10.0, "completed": 3, "failed": 1, "request_throughput": 0.3,
    "output_throughput": 4.5, "median_ttft_ms": 200.0, "p99_ttft_ms": 900.0, "mean_ttft_ms": 1.0,
    "median_itl_ms": 20.0, "p99_itl_ms": 25.0,
}  # fmt: skip


def written(tmp_path: Path, **told: Any) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(told))
    return path


def test_what_the_file_says(tmp_path: Path) -> None:
    found = read(written(tmp_path, **SHORT))
    assert found.label == "bench"
    assert found.load == {"request_rate": "inf", "burstiness": 1.0, "model_id": "m"}
    assert (found.requests, found.failed, found.requests_per_s) == (3, 1, 0.3)
    assert found.ttft == {"p50": 0.2, "p99": 0.9}
    assert found.gap == {"p50": 0.02, "p99": 0.025}
    assert found.total == {}


def test_single_values_without_those_that_failed(tmp_path: Path) -> None:
    found = read(written(
        tmp_path, **SHORT, ttfts=[0.5, 0.0, 0.1, 0.3], itls=[[0.1, 0.2], [], [0.3], [0.4]],
        errors=["", "it broke", "", ""],
    ))  # fmt: skip
    assert found.ttft == {"p50": 0.3}
    assert found.gap == {"p50": 0.2}


def test_the_names_are_those_that_vllm_writes() -> None:
    """If vLLM renames them, the reader must learn it."""
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    text = Path(spec.submodule_search_locations[0], "benchmarks", "serve.py").read_text()
    for name in ("duration", "completed", "failed", "request_throughput", "output_throughput",
                 "ttfts", "itls", "latencies", "errors", "request_rate", "burstiness"):  # fmt: skip
        assert f'"{name}"' in text
    assert 'f"median_{metric_attribute_name}_ms"' in text
    assert 'f"p{p_word}_{metric_attribute_name}_ms"' in text


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read as JSON"), ("[]", "not a result"), ("{}", "duration is no number"),
     (json.dumps({**SHORT, "completed": "x"}), "completed is no number")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(KvplugError, match=words):
        read(path)
    with pytest.raises(KvplugError, match="cannot be read"):
        read(tmp_path / "nothing.json")
