"""Events come out whole, however the stream is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug.loadtests import sse
from kvplug.loadtests.sse import EventParser

STREAM = (
    b": a comment\n\n"
    b"data: one\n\n"
    b"event: x\r\ndata:two\r\nid: 7\r\n\r\n"
    b"data: \xc3\xa9\xe2\x82\xac\ndata: second line\n\n"
    b"\n\n"
    b"data:  two spaces\n\ndata: never ended"
)
EVENTS = [b"one", b"two", "é€\nsecond line".encode(), b" two spaces"]


def parsed(pieces: list[bytes]) -> list[bytes]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_whole() -> None:
    assert parsed([STREAM]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_cut_anywhere(places: list[int]) -> None:
    cuts = [0, *sorted(places), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(cuts)]
    assert parsed(pieces) == EVENTS


def test_byte_by_byte_with_bare_returns() -> None:
    stream = b"data: a\rdata: b\r\rdata: c\r\r\n"
    assert parsed([stream[i : i + 1] for i in range(len(stream))]) == [b"a\nb", b"c"]


def test_an_event_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MOST_BYTES", 100)
    parser = EventParser()
    parser.feed(b"data: " + b"x" * 90)
    with pytest.raises(ValueError, match="without an end"):
        parser.feed(b"x" * 90)
