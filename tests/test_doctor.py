"""The doctor reports what is live, goes on after a failing check, and exits by what it found."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvplug import cli, doctor
from kvplug.patches import apply as applying


@pytest.fixture
def restored() -> Iterator[None]:
    """The doctor registers and patches as the plugin does; vLLM afterwards is as before."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    held = AttentionBackendEnum.CUSTOM.is_overridden()
    applied = dict(applying._originals)
    yield
    if not applied:
        applying.undo_all()
    if not held:
        AttentionBackendEnum.CUSTOM.clear_override()


@pytest.mark.usefixtures("restored")
def test_a_sound_installation() -> None:
    report = doctor.diagnose()
    assert report["problems"] == []
    assert report["vllm"].startswith("0.32")
    assert report["platform"] == "cpu"
    assert report["backend_live"] is True
    assert [check["name"] for check in report["checks"]] == list(doctor.CHECKS)
    assert f"{len(applying.all_patches())} applied" in [c["found"] for c in report["checks"]]


def fake(monkeypatch: pytest.MonkeyPatch, **checks: Any) -> None:
    """Made-up checks in place of the named ones; the others are fine."""
    fine = {name: (lambda: ("fine", None)) for name in doctor.CHECKS}
    monkeypatch.setattr(doctor, "CHECKS", {**fine, **checks})


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """One object, last on stdout, with the keys of the public interface."""
    fake(monkeypatch, backend=lambda: ("live", None))
    ended = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert ended.exit_code == 0
    assert json.loads(ended.stdout.splitlines()[-1]) == {
        "vllm": "fine", "platform": "fine", "backend_live": True, "problems": [],
    }  # fmt: skip


def broken() -> tuple[str, str | None]:
    raise ImportError("no module named vllm")


def test_a_failing_check_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, vLLM=broken, backend=lambda: ("their.Backend", "Not ours."))
    report = doctor.diagnose()
    assert report["vllm"] == "failed"
    assert report["backend_live"] is False
    assert report["problems"] == ["vLLM: no module named vllm", "Not ours."]
    assert len(report["checks"]) == len(doctor.CHECKS)


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=str)
def test_a_problem_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    fake(monkeypatch, vLLM=broken)
    ended = CliRunner().invoke(cli.app, ["doctor", *flags], env={"COLUMNS": "200"})
    assert ended.exit_code == 1
    assert "no module named vllm" in ended.output


def test_an_exception_without_words_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> tuple[str, str | None]:
        raise AssertionError

    fake(monkeypatch, threads=silent)
    assert doctor.diagnose()["problems"] == ["threads: AssertionError"]


@pytest.mark.parametrize(
    ("allowed", "found"),
    [(None, "found by vLLM"), ("kvplug", "found by vLLM"), ("a,kvplug", "found by vLLM"),
     ("", "switched off"), ("other", "switched off")],
)  # fmt: skip
def test_vllm_plugins(monkeypatch: pytest.MonkeyPatch, allowed: str | None, found: str) -> None:
    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    said, problem = doctor._plugin()
    assert said == found
    assert (problem is None) == (found == "found by vLLM")


def test_a_backend_that_another_plugin_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr("kvplug.plugin.register", lambda: None)
    monkeypatch.setattr(
        type(current_platform), "get_attn_backend_cls", classmethod(lambda *args: "their.Backend")
    )
    assert doctor._backend() == (
        "their.Backend", "--attention-backend CUSTOM gives their.Backend, not kvplug's backend.",
    )  # fmt: skip


@pytest.mark.parametrize(("threads", "sound"), [("1", False), (None, True)])
def test_idle_cores(monkeypatch: pytest.MonkeyPatch, threads: str | None, sound: bool) -> None:
    import numba

    monkeypatch.setattr(doctor, "num_threads", lambda: 4)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 1 if threads else 4)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("NUMBA_NUM_THREADS", threads)
    found, problem = doctor._threads()
    assert found == f"4 cores, {threads or 4} for scoring"
    assert (problem is None) == sound


def test_the_plugin_is_registered_with_vllm() -> None:
    """Through the entry point that vLLM reads, in this environment."""
    from importlib.metadata import entry_points

    [entry] = [e for e in entry_points(group="vllm.general_plugins") if e.name == "kvplug"]
    assert entry.load() is sys.modules["kvplug.plugin"].register


def test_a_folder_to_offload_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its room and speed, and nothing left in it."""
    fake(monkeypatch, backend=lambda: ("live", None))
    monkeypatch.setattr("kvplug.offload.read_speed.MOST_BYTES", 2**20)
    report = doctor.diagnose(tmp_path)
    assert report["problems"] == []
    assert list(report["offload"]) == ["offload folder", "offload reads"]
    assert "GiB free" in report["offload"]["offload folder"]
    assert report["offload"]["offload reads"].startswith("16 KiB each: ")
    assert [path.name for path in tmp_path.iterdir()] == ["0.kvplug.lock"]


def test_a_folder_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch)
    monkeypatch.setattr("kvplug.offload.cold_store.file_system", lambda folder: "tmpfs")
    [problem] = doctor.diagnose(tmp_path)["problems"]
    assert "is on tmpfs, which is memory" in problem


def test_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither check stops the other."""
    fake(monkeypatch)
    problems = doctor.diagnose(tmp_path / "no")["problems"]
    assert "is not a folder: make it first" in problems[0]
    assert problems[1].startswith("offload reads: ")


def test_the_least_hot_pool_of_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As many bytes as start-up asks for: 2 of 10 layers are dense."""
    from transformers import LlamaConfig

    from kvplug.config import KvplugConfig
    from kvplug.pipeline import region_sizes

    fake(monkeypatch)
    LlamaConfig(
        num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=2, hidden_size=512
    ).save_pretrained(tmp_path)
    found = doctor.diagnose(model=str(tmp_path))["offload"]["least hot_gib"]
    pages = region_sizes(KvplugConfig.parse({}), 32).max_pages_per_row()
    assert float(found.split()[0]) == pytest.approx(pages * 2 * 8 * 32 * 64 * 4 / 2**30, abs=1e-4)
