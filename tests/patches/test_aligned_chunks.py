"""Prefill chunks end at multiples of the window or with the prompt, and always make progress."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplug.patches import aligned_chunks
from kvplug.patches.aligned_chunks import aligned_chunk
from kvplug.selection import BACKEND_PATH

WINDOWS = st.integers(1, 600)


@given(WINDOWS, st.integers(0, 40), st.integers(1, 9000), st.integers(1, 20000))
def test_chunks(window: int, windows_done: int, wanted: int, prompt: int) -> None:
    start = windows_done * window
    tokens = aligned_chunk(start, wanted, prompt, window)
    assert 0 <= tokens <= wanted
    if start >= prompt:
        assert tokens == wanted
        return
    end = start + tokens
    assert end <= prompt
    assert end % window == 0 or end == prompt
    if wanted >= min(window, prompt - start):
        assert tokens > 0
    assert prompt - end < window or wanted - tokens < window  # no window is left behind


@given(WINDOWS, st.integers(0, 9000), st.integers(1, 9000), st.integers(1, 20000))
def test_a_chunk_that_starts_anywhere_is_never_longer(
    window: int, start: int, wanted: int, prompt: int
) -> None:
    tokens = aligned_chunk(start, wanted, prompt, window)
    assert 0 <= tokens <= wanted
    if start < prompt:
        assert tokens == 0 or (start + tokens) % window == 0 or start + tokens == prompt


@given(WINDOWS, st.integers(1, 3000), st.integers(0, 2000))
def test_a_prompt_is_done_in_whole_windows(window: int, prompt: int, extra: int) -> None:
    start = 0
    while start < prompt:
        assert start % window == 0
        step = aligned_chunk(start, min(window + extra, prompt - start), prompt, window)
        assert step > 0
        start += step
    assert start == prompt


@pytest.mark.parametrize("replayed", [1, 5, 300])
def test_a_replay_takes_the_prompt_first_and_alone(replayed: int) -> None:
    """After a preemption, what was decoded after a prompt of 300 comes in a chunk of its own."""
    assert aligned_chunk(0, 300 + replayed, 300, 256) == 300
    assert aligned_chunk(256, 44 + replayed, 300, 256) == 44
    assert aligned_chunk(300, replayed, 300, 256) == replayed


@pytest.mark.parametrize(
    ("start", "wanted", "expected"),
    [(0, 255, 0), (0, 256, 256), (0, 511, 256), (512, 300, 256), (512, 488, 488), (768, 231, 0)],
)
def test_by_hand(start: int, wanted: int, expected: int) -> None:
    """A prompt of 1000 tokens, windows of 256."""
    assert aligned_chunk(start, wanted, 1000, 256) == expected


@given(st.integers(1, 8), st.integers(0, 20), st.integers(1, 9000), st.integers(1, 9000))
def test_a_recipe_may_limit_chunks(
    windows: int, windows_done: int, wanted: int, prompt: int
) -> None:
    """The limit changes where chunks end, never that they end at windows; replays have none."""
    start, limit = windows_done * 256, windows * 256
    tokens = aligned_chunk(start, wanted, prompt, 256, limit)
    if start >= prompt:
        assert tokens == wanted
    else:
        assert tokens == aligned_chunk(start, min(wanted, limit), prompt, 256) <= limit


@pytest.mark.parametrize(
    ("start", "wanted", "expected"),
    [(0, 8192, 4096), (1024, 8192, 3072), (3584, 8192, 512), (3840, 8192, 512), (4096, 8192, 512),
     (0, 2048, 2048)],
)  # fmt: skip
def test_no_limit_where_nothing_is_retrieved(start: int, wanted: int, expected: int) -> None:
    """Windows of 256, at most 512 tokens a chunk, contexts up to 4,100 tokens dense."""
    assert aligned_chunk(start, wanted, 9000, 256, 512, 4100) == expected


# ---------------------------------------------------------------- the wrappers


class Scheduler:
    """A scheduler as vLLM's is, where the patches touch it."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.need_mamba_block_aligned_split = False
        self.kv_cache_manager = SimpleNamespace(coordinator=SimpleNamespace())
        self.rest = (args, kwargs)

    def _mamba_block_aligned_split(
        self, request: Any, num_new_tokens: int, local: int = 0, external: int = 0
    ) -> int:
        return -num_new_tokens - local - external


def scheduler(selected: bool) -> Any:
    """A patched one; the class itself stays as it is."""
    backend = SimpleNamespace(name="CUSTOM", get_path=lambda: BACKEND_PATH)
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=backend if selected else None),
        additional_config={"kvplug": {"window": 64}} if selected else {},
    )
    made = Scheduler.__new__(Scheduler)
    aligned_chunks._wrap_init(Scheduler.__init__)(made, config, 1, log_stats=True)
    split = aligned_chunks._wrap_split(Scheduler._mamba_block_aligned_split)
    made._mamba_block_aligned_split = functools.partial(split, made)  # type: ignore[method-assign]
    assert made.rest == ((1,), {"log_stats": True})
    return made


def test_a_scheduler_that_serves_kvplug_aligns() -> None:
    made = scheduler(selected=True)
    assert made.need_mamba_block_aligned_split is True
    request = SimpleNamespace(num_computed_tokens=64, num_prompt_tokens=1000)
    assert made._mamba_block_aligned_split(request, 100) == 64
    # Tokens that a prefix hit gives come before the chunk.
    assert made._mamba_block_aligned_split(request, 100, 64, 128) == 64
    assert made._mamba_block_aligned_split(request, 100, 32) == 96
    assert made._mamba_block_aligned_split(request, 936) == 936


def test_any_other_scheduler_is_left_alone() -> None:
    made = scheduler(selected=False)
    assert made.need_mamba_block_aligned_split is False
    request = SimpleNamespace(num_computed_tokens=64, num_prompt_tokens=1000)
    assert made._mamba_block_aligned_split(request, 100, 3, 4) == -107
