"""Uniform events need no marks: a length in pages is all there is."""

from __future__ import annotations

import pytest

from kvplug.errors import KvplugError
from kvplug.segment.base import EventStarts
from kvplug.segment.uniform import Uniform
from tests.made_up import layer_of


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (8, 1), (15, 1), (16, 2), (128, 16)])
def test_lengths_are_whole_pages(tokens: int, pages: int) -> None:
    layer = layer_of(page=8)
    stage = Uniform(max_tokens=tokens)
    stage.for_layer(layer)
    events = layer.shared(EventStarts)
    assert events.most_pages == pages
    assert not events.starts.any()
    assert stage.chunk_limit(512, 256) is None
    assert not stage.needs_logits


def test_empty_events_are_refused() -> None:
    with pytest.raises(KvplugError, match="max_tokens >= 1"):
        Uniform(max_tokens=0)
