"""Pages that a step writes to, each once, and which of them begin anew."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.offload.written import Written

PAGE = 32


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 12 * PAGE), max_size=200))
def test_written(places: list[int]) -> None:
    written = Written.of(torch.tensor(places, dtype=torch.int64), PAGE)
    real = [place for place in places if place >= 0]
    assert written.tokens == len(real)
    assert written.pages.tolist() == sorted({place // PAGE for place in real})
    begun = {place // PAGE for place in real if place % PAGE == 0}
    assert set(written.pages[written.begun > 0]) == begun
    assert written.pages.dtype == np.int64
