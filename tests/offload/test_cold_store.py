"""Folders that cannot hold a cache are refused with the reason, before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvplug.config import KvplugConfig, OffloadConfig
from kvplug.errors import KvplugError
from kvplug.offload.cold_store import GIB, ColdStore, check_folder, file_system, store_of
from kvplug.offload.setup import check_slots


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cold")


def disk(folder: Path) -> OffloadConfig:
    return OffloadConfig.model_validate({"tier": "disk", "path": str(folder)})


def test_a_folder_that_will_do(folder: Path) -> None:
    check_folder(str(folder), 2**20)
    check_folder(str(folder), 2**20)


def test_a_missing_folder(folder: Path) -> None:
    with pytest.raises(KvplugError, match="not a folder"):
        check_folder(str(folder / "none"), 2**20)


def test_too_little_room(folder: Path) -> None:
    with pytest.raises(KvplugError, match=r"asks for 1048576.0 GiB, and .* GiB free"):
        check_folder(str(folder), 2**20 * GIB)


def test_memory_is_not_a_disk() -> None:
    assert file_system(Path("/dev/shm")) == "tmpfs"
    with pytest.raises(KvplugError, match="on tmpfs, which is memory"):
        check_folder("/dev/shm", 2**20)


def test_what_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the refusal is made up."""

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KvplugError, match="cannot be written to: Permission denied"):
        check_folder(str(folder), 2**20)


HOLD = """
import sys, time
from kvplug.config import OffloadConfig
from kvplug.offload.cold_store import ColdStore
store = ColdStore(OffloadConfig.model_validate({"tier": "disk", "path": sys.argv[1]}), 0)
print("held", flush=True)
sys.stdin.read()
"""
ASK = "import sys; from kvplug.offload.cold_store import check_folder; check_folder(sys.argv[1], 1)"


def test_another_engine_has_it_but_its_parent_may_ask_again(folder: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        check_folder(str(folder), 2**20 * GIB)
        other = subprocess.run(
            [sys.executable, "-c", ASK, str(folder)], capture_output=True, text=True, check=False
        )
        assert "in use by another engine" in other.stderr
        with pytest.raises(KvplugError, match="in use by another engine"):
            ColdStore(disk(folder), 0)
        child.communicate()
    ColdStore(disk(folder), 0)


def test_a_disk_that_fills_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(KvplugError, match=r"could not reserve 1\.0 GiB .* is full"):
        ColdStore(disk(folder), 0).allocate(GIB)
    assert [path.name for path in folder.iterdir()] == ["0.kvplug.lock"]


def test_memory_is_given_back_and_content_stays(folder: Path) -> None:
    store = ColdStore(disk(folder), 0)
    tensor = store.allocate(64 * 2**20)
    assert store_of(tensor[5:]) is store
    tensor.fill_(7)
    assert resident(tensor.data_ptr()) > 60 * 2**20
    store.touched(2**20)
    store.touched(2**30)
    assert store.most_mapped == 2**30 + 2**20
    assert resident(tensor.data_ptr()) < 2**20
    assert int(tensor.sum(dtype=int)) == 7 * len(tensor)


def resident(address: int) -> int:
    """Bytes of the mapping at an address that are in memory."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            found = first <= address < last
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def test_a_pool_below_the_least_is_told_the_least() -> None:
    options = {"budget": 512, "offload": {"tier": "host", "hot_gib": 0.001}}
    with pytest.raises(KvplugError, match=r"too small: .* take 0\.0158 GiB"):
        check_slots(KvplugConfig.parse(options), 32, 4, 2, 2**14)
    enough = {**options, "offload": {"tier": "host", "hot_gib": 0.016}}
    assert check_slots(KvplugConfig.parse(enough), 32, 4, 2, 2**14) >= 129 * 4
