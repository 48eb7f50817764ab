"""The command's exit code says what is wrong, and nonsense is one sentence."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvplug.errors import KvplugError
from kvplug.loadtests import run as module
from kvplug.loadtests.command import FAILED, NOT_BELIEVABLE, PARTIAL, load_app
from kvplug.loadtests.contenders import Contender
from kvplug.loadtests.folder import Folder, Run
from kvplug.loadtests.records import Appender, read_lines, read_records
from kvplug.loadtests.slo import Slo
from kvplug.serve.server import Server, free_port
from tests.loadtests.conftest import FAKE
from tests.loadtests.made_up import EXACT, record, run_of


@contextmanager
def quiet() -> Iterator[Callable[[str], None]]:
    yield lambda _: None


def called(*arguments: str) -> Any:
    return CliRunner().invoke(load_app(quiet, Console(width=200)), list(arguments))


def test_running_servers_are_compared(
    fake: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "calibrate", lambda *_: EXACT)
    slow, fast = fake("--ttft-s", "0.3"), fake("--ttft-s", "0.05", "--gap-s", "0.001")
    found = called(
        "--url", f"slow={slow.url}", "--url", f"fast={fast.url}", "--requests", "4", "--lengths",
        "fixed:300", "--out", str(tmp_path / "x"), "--slo", "ttft=0.2,e2e=5",
        "--scrape", "0", "--json",
    )  # fmt: skip
    told = json.loads(found.stdout.strip().splitlines()[-1])
    assert [s["setup"] for s in told["summaries"]] == ["slow", "fast"]
    assert told["summaries"][0]["good"]["value"] == 0.0
    assert told["run"]["environment"]["servers"] == {"slow": slow.url, "fast": fast.url}
    # The slow one breaks the limit, unless this machine was too busy to believe anything.
    assert found.exit_code == (FAILED if told["believable"] else NOT_BELIEVABLE)
    for name in ("report.html", "report.json", "requests.csv", "junit.xml", "requests.jsonl"):
        assert (tmp_path / "x" / name).stat().st_size > 0


def folder_with(path: Path, run: Run, *records: Any) -> str:
    folder = Folder(path)
    folder.create(run)
    requests = Appender(folder.requests_path)
    for one in records:
        requests.add(one)
    requests.close()
    return str(path)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, 0),
        ({"slo": Slo(ttft=0.1)}, FAILED),
        ({"troubles": {"a": "the server died"}}, PARTIAL),
        ({"is_over": False}, PARTIAL),
        ({"calibration": replace(EXACT, ttft_p95=0.1)}, NOT_BELIEVABLE),
        ({"calibration": None, "is_over": False}, NOT_BELIEVABLE),
    ],
)
def test_exit_codes(tmp_path: Path, changed: dict[str, Any], code: int) -> None:
    found = called("--from", folder_with(tmp_path / "x", run_of("a", **changed), record()))
    assert found.exit_code == code, found.output
    assert "report.html" in found.output
    assert ("not believable" in found.output) is (code == NOT_BELIEVABLE)


def test_vllm_bench_is_drawn_beside(tmp_path: Path) -> None:
    told = {"duration": 1.0, "completed": 7, "request_throughput": 7.0, "output_throughput": 70.0}
    (tmp_path / "theirs.json").write_text(json.dumps(told))
    where = folder_with(tmp_path / "x", run_of("a"), record())
    found = called("run", "--from", where, "--vllm-bench", str(tmp_path / "theirs.json"))
    assert found.exit_code == 0
    assert "<td>theirs</td>" in (tmp_path / "x" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "needels"], "did you mean 'needles'"),
        (["--shape", "brust"], "did you mean 'burst'"),
        (["--loop", "opne"], "did you mean 'open'"),
        (["--levels", "many"], "must be numbers"),
        (["--levels", ""], "takes 1 levels"),
        (["--slo", "tftf=1"], "did you mean 'ttft'"),
        (["--compare", "dense,simhsh"], "did you mean 'simhash'"),
        (["--compare", ","], "Name servers"),
        (["--url", "nonsense"], "must be a URL"),
        (["--from", "nowhere-at-all"], "is not a load test"),
        (["--vllm-bench", "nowhere-at-all"], "cannot be read"),
    ],
)
def test_nonsense_is_one_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    found = called(*arguments, "--lengths", "fixed:300", "--out", str(tmp_path / "x"))
    assert isinstance(found.exception, KvplugError)
    assert words in str(found.exception)
    assert not (tmp_path / "x").exists()


def test_a_server_that_is_not_there_is_a_partial_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "calibrate", lambda *_: EXACT)
    found = called("--url", f"http://127.0.0.1:{free_port()}", "--lengths", "fixed:300",
                   "--requests", "2", "--out", str(tmp_path / "x"))  # fmt: skip
    assert found.exit_code == PARTIAL
    assert "cannot be reached" in found.output


def test_a_run_that_is_terminated_is_partial_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while a request is in flight."""
    monkeypatch.setattr(module, "calibrate", lambda *_: EXACT)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    fake = [*FAKE, "--ttft-s", "0.01", "--gap-s", "30"]
    monkeypatch.setattr(
        "kvplug.loadtests.contenders.started", lambda *_: [Contender("a", command=fake)]
    )
    folder = tmp_path / "x"

    def terminate() -> None:
        deadline = time.monotonic() + 60
        while "client" not in kinds(folder / "samples.jsonl") and time.monotonic() < deadline:
            time.sleep(0.05)  # a client process tells of itself once a second
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=terminate)
    killer.start()
    found = called("--lengths", "fixed:300", "--requests", "2", "--warmups", "0", "--scrape", "0",
                   "--out", str(folder))  # fmt: skip
    killer.join()
    # A machine that is too busy to measure is told first.
    assert found.exit_code in (PARTIAL, NOT_BELIEVABLE), found.output
    assert "the run was interrupted" in found.output
    assert [r.error for r in read_records(folder / "requests.jsonl")] == ["stopped", "stopped"]
    left = {child.pid for child in psutil.Process().children(recursive=True)}
    assert left <= before


def kinds(path: Path) -> set[str]:
    return {line["kind"] for line in read_lines(path)}
