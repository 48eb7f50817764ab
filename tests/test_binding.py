"""What looks on in which worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvplug.binding import _observers
from tests.test_startup import engine


@pytest.mark.parametrize(("rank", "index", "traces"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_one_worker_of_all_engines_traces(
    rank: int, index: int, traces: bool, tmp_path: Path
) -> None:
    """They would all make the same file, and vLLM calls each of them engine 0 of 1."""
    config = engine({"trace": str(tmp_path / "trace.jsonl")})
    config.model_config.tokenizer = "some-model"
    config.parallel_config.rank, config.parallel_config.data_parallel_index = rank, index
    config.parallel_config.data_parallel_rank = 0
    assert (_observers(config, {}).trace is not None) == traces
    assert (tmp_path / "trace.jsonl").exists() == traces
