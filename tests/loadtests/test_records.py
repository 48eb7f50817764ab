"""A record says when and what; files of records survive being cut off."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.client import Reply
from kvplug.loadtests.records import (
    Appender,
    read_lines,
    read_records,
    record_of,
    words,
)
from kvplug.loadtests.workloads.base import Turn
from tests.loadtests.made_up import failed, record

ASKED = Turn([], "Blue harbor six.", "needle", 300, {})
WHERE = {"setup": "a", "phase": 1, "session": 2, "turn": 0, "process": 0}


def test_times_count_from_the_phase_and_from_the_intended_time() -> None:
    reply = Reply(
        sent=103.0, end=106.0, stamps=[104.0, 104.5, 105.5], parts=["The blue", " HARBOR", " six"],
        usage={"prompt_tokens": 9, "completion_tokens": 3,
               "prompt_tokens_details": {"cached_tokens": 8}}, finish="stop", is_done=True,
    )  # fmt: skip
    found = record_of(reply, ASKED, zero=100.0, intended=101.0, free=102.5, **WHERE)
    assert (found.intended, found.free, found.sent, found.first, found.end) == (1, 2.5, 3, 4, 6)
    assert (found.ttft, found.ttft_sent, found.total, found.lag) == (3, 1, 5, 0.5)
    assert found.gaps == [0.5, 1.0]
    assert (found.prompt_tokens, found.completion_tokens, found.cached_tokens) == (9, 3, 8)
    assert found.right is True
    assert found.key == (1, 2, 0)


def test_a_failure_is_neither_right_nor_wrong() -> None:
    reply = Reply(sent=1.0, end=2.0, stamps=[1.5], parts=["blue harbor six"])
    reply.fail("cut off", "x" * 1000)
    reply.fail("later", "which does not count")
    found = record_of(reply, ASKED, zero=0.0, intended=1.0, free=1.0, **WHERE)
    assert (found.error, found.right, len(found.detail)) == ("cut off", None, 300)
    assert found.first == 1.5


@pytest.mark.parametrize(
    ("text", "right"),
    [("Blue harbor six.", True), ("it is blue, harbor: six!", True), ("blue harbor sixty", False),
     ("", False)],
)  # fmt: skip
def test_right_is_by_whole_words(text: str, right: bool) -> None:
    reply = Reply(sent=1.0, end=2.0, stamps=[1.5], parts=[text], is_done=True)
    assert record_of(reply, ASKED, 0.0, 1.0, 1.0, **WHERE).right is right
    assert words("") == ""


@pytest.mark.parametrize(
    ("tokens", "gap", "is_by_token"),
    [(3, 0.5, True), (4, 0.5, True), (11, 0.1, False), (None, 0.5, False), (2, 1.0, False)],
)
def test_the_mean_gap_is_by_tokens(tokens: int | None, gap: float, is_by_token: bool) -> None:
    """Three pieces, and a fourth token that ended the turn; or several tokens a piece."""
    found = record(completion_tokens=tokens)
    assert found.gap == pytest.approx(gap)
    assert found.is_token_by_token is is_by_token
    assert record(gaps=[]).gap is None


def test_files_keep_every_record(tmp_path: Path) -> None:
    path = tmp_path / "requests"
    lines = [record(session=i) for i in range(50)] + [failed(session=50)]
    appender = Appender(path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(appender.add, lines))
    appender.close()
    assert path.stat().st_mode & 0o777 == 0o600
    found = read_records(path)
    assert sorted(found, key=lambda r: r.session) == lines


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "requests"
    whole = json.dumps(asdict(record()))
    path.write_text(f"{whole}\n{whole[:40]}")
    assert read_records(path) == [record()]
    assert read_lines(tmp_path / "nothing") == []


@pytest.mark.parametrize("text", ["{\n", '{"a": 1}\n'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "requests"
    path.write_text(text)
    with pytest.raises(KvplugError, match="is not a file of"):
        read_records(path)
