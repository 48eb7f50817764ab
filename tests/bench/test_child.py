"""Processes with an engine: results as they come, and the last words of those that fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvplug.bench import child
from kvplug.bench.job import Job
from kvplug.errors import KvplugError

ENGINE = """
import os, sys
text = sys.stdin.read()
print("vLLM says CELL", "CELLO {}", sep="\\n")
print('CELL {"text": "%s"}' % text)
print('RECALL {"plugins": "%s"}' % os.environ.get("VLLM_PLUGINS", "all"))
if text == "fail":
    sys.exit("first words\\n[rank0]: last words")
"""


def job(policy: str) -> Job:
    return Job(policy, "recall", [600], [1], 1, 32, 4096, 64, True, 1, {})


@pytest.fixture(autouse=True)
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``fake_engine`` that the process finds."""
    (tmp_path / "fake_engine.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(child, "_kv_gib", lambda job: 1)


def test_results() -> None:
    found = list(child.results("fake_engine", job("quest"), "hello"))
    assert found == [("CELL", {"text": "hello"}), ("RECALL", {"plugins": "all"})]


def test_stock_vllm_loads_no_plugin() -> None:
    found = dict(child.results("fake_engine", job("dense"), "hello"))
    assert found["RECALL"] == {"plugins": ""}


def test_a_failure_has_its_last_words() -> None:
    results = child.results("fake_engine", job("quest"), "fail")
    assert next(results) == ("CELL", {"text": "fail"})
    with pytest.raises(KvplugError, match=r"policy 'quest' failed: \[rank0\]: last words"):
        list(results)
