"""Whole runs against fake servers: clocks, schedules, and nothing lost whatever breaks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvplug.loadtests import run as module
from kvplug.loadtests.contenders import Contender
from kvplug.loadtests.folder import Folder, Run
from kvplug.loadtests.outputs import write_all
from kvplug.loadtests.records import Record
from kvplug.loadtests.settings import Settings
from kvplug.loadtests.slo import Slo
from kvplug.serve.server import Server
from tests.loadtests.conftest import FAKE
from tests.loadtests.made_up import EXACT, settings

BOUND_S = 0.25
"""Medians are within this of what is known, also on a machine that does other things too."""


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration has a test of its own."""
    monkeypatch.setattr(module, "calibrate", lambda *_: EXACT)


def measured(
    path: Path, asked: Settings, contenders: Sequence[Contender], tokenizer: Any
) -> tuple[Run, list[Record], list[dict[str, Any]]]:
    """A run's folder, once it is over."""
    labels = [contender.label for contender in contenders]
    folder, run = Folder(path), Run(asked, Slo(), labels, {})
    folder.create(run)
    module.run(run, contenders, folder, tokenizer, "", lambda _: None)
    return folder.read()


def test_an_open_loop_waits_for_no_server(
    fake: Callable[..., Server], tokenizer: Any, tmp_path: Path
) -> None:
    """The server stands still for 0.8 s; requests go out all the same, and their wait counts."""
    server = fake("--ttft-s", "0.02", "--gap-s", "0", "--stall-at-s", "0.4", "--stall-s", "0.8")
    asked = settings(
        loop="open", process="constant", levels=(20.0,), seconds=1.5, requests=100, processes=2
    )
    run, records, samples = measured(
        tmp_path / "run", asked, [Contender("a", url=server.url)], tokenizer
    )
    assert not run.is_partial
    records.sort(key=lambda r: r.intended)
    assert [r.session for r in records] == list(range(30))
    assert {r.process for r in records} == {0, 1}
    assert all(r.error is None and r.right for r in records)
    for record in records:
        assert record.intended == pytest.approx((record.session + 0.5) / 20)
        assert record.sent >= record.intended
    assert statistics.median(r.lag for r in records) < BOUND_S
    # Nothing is answered while it stands still, which is for 0.8 s from 0.4 s after the first.
    first = records[0].sent
    caught = [r for r in records if first + 0.5 < r.sent < first + 1.1]
    assert len(caught) >= 9
    for record in caught:
        assert record.ttft is not None
        assert record.ttft >= first + 1.2 - record.intended
    clients = [sample for sample in samples if sample["kind"] == "client"]
    assert {sample["process"] for sample in clients} == {0, 1}
    assert any(sample["kind"] == "server" for sample in samples)


def test_a_closed_loop_asks_pairs_and_recovers_delays(
    fake: Callable[..., Server], tokenizer: Any, tmp_path: Path
) -> None:
    slow, fast = fake("--ttft-s", "0.4", "--gap-s", "0.05"), fake("--ttft-s", "0.1", "--gap-s", "0")
    contenders = [Contender("slow", url=slow.url), Contender("fast", url=fast.url)]
    run, records, _ = measured(tmp_path / "run", settings(levels=(3.0,)), contenders, tokenizer)
    assert not run.is_partial
    by_setup = {s: {r.key: r for r in records if r.setup == s} for s in run.setups}
    assert by_setup["slow"].keys() == by_setup["fast"].keys() == {(0, i, 0) for i in range(6)}
    for key, record in by_setup["slow"].items():
        other = by_setup["fast"][key]
        assert (record.expected, record.prompt_tokens, record.text) == (
            other.expected, other.prompt_tokens, other.text,
        )  # fmt: skip
    for setup, known, gap in (("slow", 0.4, 0.05), ("fast", 0.1, 0.0)):
        mine = list(by_setup[setup].values())
        firsts = [r.ttft_sent or 0.0 for r in mine]
        assert min(firsts) >= known
        assert statistics.median(firsts) < known + BOUND_S
        between = statistics.median(g for r in mine for g in r.gaps)
        assert gap - 0.01 <= between < gap + BOUND_S
    # Three users, six sessions: nobody waits for more than the one before.
    slow_ones = sorted(by_setup["slow"].values(), key=lambda r: r.sent)
    assert slow_ones[3].sent >= min(r.end for r in slow_ones[:3])
    report = write_all(Folder(tmp_path / "run"), [])
    assert report.pairs[0].same_text == 6
    assert report.pairs[0].ttft is not None
    assert report.pairs[0].ttft.value > 2


def test_turns_follow_answers_and_phases_follow_phases(
    fake: Callable[..., Server], tokenizer: Any, tmp_path: Path
) -> None:
    server = fake("--ttft-s", "0.05", "--gap-s", "0")
    asked = settings(
        loop="open", process="constant", shape="sweep", levels=(0.5, 4.0, 8.0), seconds=0.5,
        workload="multi-turn", pause_s=0.1,
    )  # fmt: skip
    run, records, samples = measured(
        tmp_path / "run", asked, [Contender("a", url=server.url)], tokenizer
    )
    assert not run.is_partial
    zeros = {s["phase"]: s["clock"] for s in samples if s["kind"] == "phase"}
    assert sorted(zeros) == [1, 2]  # at 0.5 requests per s, none is due within 0.5 s
    sessions = {(r.phase, r.session) for r in records}
    assert len(records) == 2 * len(sessions) > 0
    turns = {r.key: r for r in records}
    for phase, session in sessions:
        before, after = turns[phase, session, 0], turns[phase, session, 1]
        assert after.intended >= before.end
        assert after.right
    ends = [zeros[1] + r.end for r in records if r.phase == 1]
    assert max(ends) <= zeros[2]


def test_a_server_that_dies_loses_nothing(tokenizer: Any, tmp_path: Path) -> None:
    flags = ["--ttft-s", "0.02", "--gap-s", "0", "--die-after", "4"]
    dying = Contender("dying", command=[*FAKE, *flags])
    living = Contender("living", command=[*FAKE, *flags[:4]])
    asked = settings(levels=(1.0,), requests=30)
    run, records, _ = measured(tmp_path / "run", asked, [dying, living], tokenizer)
    assert run.is_partial
    assert "the server died" in run.troubles["dying"]
    assert list(run.troubles) == ["dying"]
    by_error = {
        setup: [r.error for r in records if r.setup == setup] for setup in ("dying", "living")
    }
    # The last of the four may die with its end unsent.
    assert by_error["dying"].count(None) in (3, 4)
    assert set(by_error["dying"]) - {None} <= {"cut off", "refused", "stopped"}
    assert by_error["living"] == [None] * 30
    write_all(Folder(tmp_path / "run"), [])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Partial: not everything was asked. dying: the server died" in page


def test_a_run_that_takes_too_long_keeps_what_was_begun(
    fake: Callable[..., Server], tokenizer: Any, tmp_path: Path
) -> None:
    server = fake("--ttft-s", "0.01", "--gap-s", "30")
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    asked = replace(settings(levels=(2.0,)), most_s=2.0)
    run, records, _ = measured(tmp_path / "run", asked, [Contender("a", url=server.url)], tokenizer)
    assert "longer than it may" in run.troubles["a"]
    assert [r.error for r in records] == ["stopped", "stopped"]
    assert all(r.first is not None and r.text for r in records)
    left = psutil.Process().children(recursive=True)
    assert {child.pid for child in left} <= before


def test_nobody_answers(tokenizer: Any, tmp_path: Path) -> None:
    bad = Contender("bad", command=["-c", "raise SystemExit('no model')"])
    run, records, _ = measured(tmp_path / "run", settings(), [bad], tokenizer)
    assert "no model" in run.troubles["bad"]
    assert records == []


def test_documents_that_cannot_be_made(tokenizer: Any, tmp_path: Path) -> None:
    from kvplug.errors import KvplugError

    asked = settings(workload="multi-turn", turns=20, lengths="fixed:128")
    materials = module.materials_of(asked, tokenizer)
    found = module.prepare(asked, materials, tmp_path, lambda _: None)
    assert len(found) == 1  # shorter documents have fewer turns
    materials.memory["broken"] = None
    with pytest.raises(KvplugError, match="cannot be made"):
        module.prepare(asked, replace(materials, tokenizer=Broken()), tmp_path, lambda _: None)


class Broken:
    """A tokenizer that cannot."""

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise ValueError("no template")
