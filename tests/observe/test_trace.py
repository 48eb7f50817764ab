"""A trace says what was selected, keeps to its size, and is nobody else's to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvplug.errors import KvplugError
from kvplug.exact_mass import ExactAttention
from kvplug.observe.mass_meter import MassMeter
from kvplug.observe.trace import HEAVY, LayerTrace, Trace, check_path
from tests.cases import PolicyCase
from tests.made_up import Piece, World, reader_of

OPTIONS = {"budget": 40, "sink": 8, "local": 16, "window": 16, "dense_below": 0}
BATCH = [Piece(0, 128, 37, True), Piece(1, 250, 1, False), Piece(2, 20, 1, False)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def traced(path: Path, **changed: Any) -> tuple[World, MassMeter]:
    """One step, traced; what attended to what, and what a meter measured."""
    world = World(PolicyCase("quest", {}), OPTIONS)
    plan = world.plan(BATCH)
    assert plan is not None
    world.attend(BATCH, plan)
    trace = Trace(str(path), {"page": 8}, **changed)
    trace.names = ["a", "b", "c"]
    trace.tokens_of = lambda row: np.arange(BATCH[row].stop, dtype=np.int32)
    exact = ExactAttention(reader_of(world.cache), 0.25, 0.0)
    LayerTrace(exact, trace, 7)(world.queries(BATCH), plan)
    meter = MassMeter(reader_of(world.cache), 0.25, 0.0, since=0)
    meter(world.queries(BATCH), plan)
    return world, meter


def test_every_window_and_whose_it_is(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    world, meter = traced(path)
    attended = world.run(BATCH)
    head, *rest = lines(path)
    assert head == {"kind": "head", "note": "This file holds prompts.", "page": 8}
    requests = [line for line in rest if line["kind"] == "request"]
    assert [(line["request"], len(line["tokens"])) for line in requests] == [("a", 165), ("b", 251)]
    windows = [line for line in rest if line["kind"] == "window"]
    found = [(line["request"], line["first"], line["end"]) for line in windows]
    assert found == [("a", 128, 144), ("a", 144, 160), ("a", 160, 165), ("b", 250, 251)]
    for line in windows:
        assert line["layer"] == 7
        wanted = attended["ab".index(line["request"]), line["first"]]
        assert wanted is not None
        begin, end = line["far"]
        for pages, best, row in zip(line["selected"], line["best"], wanted.pages, strict=True):
            assert pages == [page for page in row if begin <= page < end]
            assert len(best) == len(pages)
            assert best == sorted(set(best))
        for heavy, best in zip(line["heavy"], line["best"], strict=True):
            shares = sorted((share for _, share in heavy), reverse=True)
            assert all(share >= HEAVY for share in shares)
            # The best are the heaviest: what is heavy and not among them weighs less than each.
            among = [share for page, share in heavy if page in best]
            assert shares[: len(among)] == sorted(among, reverse=True)
    assert windows[-1]["token"] == [250]
    assert "token" not in windows[0]
    # The meter's windows are the trace's, in order; the dense one is not traced.
    for line, mass in zip(windows, meter.measured, strict=False):
        assert sum(line["captured"]) / 3 == pytest.approx(mass.captured, abs=1e-4)
        assert sum(line["best_captured"]) / 3 == pytest.approx(mass.best, abs=1e-4)


def test_it_ends_where_it_is_full(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    traced(path, most_bytes=1500)
    *_, last = lines(path)
    assert last == {"kind": "full"}
    assert path.stat().st_size < 1600


def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    Trace(str(path), {})
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_trace_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("dear")
    with pytest.raises(KvplugError, match="exists already"):
        Trace(str(path), {})
    assert path.read_text() == "dear"


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvplugError, match="there is no folder"):
        check_path(str(tmp_path / "nowhere" / "trace.jsonl"))


def test_a_disk_that_fails_ends_the_trace_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace(str(tmp_path / "trace.jsonl"), {})

    def full(text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace, "_file", type("File", (), {"write": staticmethod(full)}))
    trace.write({"kind": "window"})
    assert trace.is_full
    trace.write({"kind": "window"})
