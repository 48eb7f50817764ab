"""Reads of a disk are measured within bounds, and leave nothing behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kvplug.offload import read_speed
from kvplug.offload.read_speed import measure_reads


def test_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_speed, "MOST_BYTES", 3 * 2**20)
    monkeypatch.setattr(read_speed, "CHUNK", 2**20)
    speed = measure_reads(tmp_path, 2**14, 3)
    assert speed.file_bytes == 3 * 2**20
    assert 0 < speed.latency_s < 10
    assert speed.bytes_per_s > 0
    assert not list(tmp_path.iterdir())


def test_a_slow_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk is written, however long it takes, and reads stop when their time is over."""
    monkeypatch.setattr(read_speed, "CHUNK", 2**18)
    monkeypatch.setattr(os, "fdatasync", lambda fd: time.sleep(1))
    calls, original = list[int](), os.preadv

    def slow(fd: int, buffers: list[bytearray], offset: int) -> int:
        calls.append(offset)
        time.sleep(0.3)
        return original(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)
    speed = measure_reads(tmp_path, 2**14, 2)
    assert len(calls) <= 2 + 2 * 2
    assert speed.file_bytes == 2**18
    assert speed.latency_s >= 0.3


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        measure_reads(tmp_path / "no", 2**14, 2)
