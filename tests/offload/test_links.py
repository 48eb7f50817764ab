"""Links say which pages lie side by side and which begin events, for the newest windows."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.offload.links import NONE, LinkArrays, link_pages, next_in_event
from kvplug.offload.lru import Slots, use_events
from kvplug.offload.place import find_rows, place_rows
from kvplug.select.event_choice import find_events

PAGE = 32


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), most=st.integers(1, 5), has_events=st.booleans())
def test_links(seed: int, most: int, has_events: bool) -> None:
    draw = np.random.default_rng(seed)
    table = draw.permutation(60).astype(np.int32).reshape(2, 30)
    starts = (draw.random(60) < 0.3).astype(np.uint8)
    request, begin = np.array([0, 0, 1]), np.array([1, 1, 2])
    end = np.array([7, int(draw.integers(8, 30)), int(draw.integers(3, 30))])
    links = LinkArrays.empty(60)
    rows = np.arange(3, dtype=np.int32)
    given = (starts, most) if has_events else (starts[:0], 1)
    link_pages(links, table, rows, request, begin, end, *given)
    known = set[int]()
    for s in (1, 2):
        far = table[request[s], begin[s] : end[s]]
        begins = np.zeros(len(far) + 1, np.int32)
        count = find_events(far, starts, most, begins) if has_events else len(far)
        begins = begins if has_events else np.arange(len(far) + 1)
        for e in range(count):
            event = far[begins[e] : begins[e + 1]]
            assert (links.head[event] == event[0]).all()
            walked = [event[0]]
            while (after := next_in_event(links, walked[-1], event[0])) != NONE:
                walked.append(after)
            assert walked == event.tolist()
        assert links.before[far].tolist() == [NONE, *far[:-1].tolist()]
        assert links.after[far].tolist() == [*far[1:].tolist(), NONE]
        known |= set(far.tolist())
    others = [page for page in range(60) if page not in known]
    assert (links.head[others] == NONE).all()


def test_the_event_that_was_used_longest_ago_goes_as_one() -> None:
    """And the use of one of its pages is the use of all."""
    links = LinkArrays.empty(8)
    for a, b in ((0, 1), (2, 3), (4, 5)):
        links.head[[a, b]], links.after[a], links.before[b] = a, b, a
    state = Slots.empty(8, 4, links=links, by_event=True)
    buffers = np.empty(4, np.int32), np.empty(4, np.int32)

    def attend(*pages: int) -> int:
        table, out = np.array([pages], np.int32), np.zeros((1, len(pages)), np.int32)
        lengths = np.array([len(pages) * PAGE], np.int32)
        lacking, _ = find_rows(state, table, lengths, PAGE, out)
        evicted = 0
        if lacking:
            evicted = place_rows(state, table, lengths, PAGE, 0, 1, lacking, out, *buffers)[3]
        use_events(state, table, lengths, PAGE)
        state.check()
        return int(evicted)

    assert attend(0, 1) == 0
    assert attend(2, 3) == 0
    assert attend(0) == 0
    assert attend(4) == 2, "2 and 3 go; 1 was used with 0"
    assert {int(entry) for entry in state.entry_in if entry >= 0} == {0, 1, 4}
    assert attend(5, 6, 7) == 2, "0 and 1"
    assert {int(entry) for entry in state.entry_in if entry >= 0} == {4, 5, 6, 7}
