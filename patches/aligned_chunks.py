"""Ends prefill chunks at multiples of the window, and at the end of the prompt.

A window that the scheduler splits would be probed with other queries than the whole one, and the
same request would get another answer under load. vLLM's scheduler aligns chunks already, for
Mamba's ``align`` cache mode; the two patches switch that step on and let kvplug decide in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvplug.patches import whole_hits
from kvplug.patches.record import Patch
from kvplug.selection import is_selected, options_of

WINDOW = "kvplug_window"
"""Attribute of a scheduler that serves kvplug: its window, in tokens."""
LIMIT = "kvplug_chunk_limit"
"""Attribute of such a scheduler: most prompt tokens in a chunk, or None."""
DENSE_BELOW = "kvplug_dense_below"
"""Attribute of such a scheduler: tokens up to which contexts are dense."""


def aligned_chunk(
    start: int, num_new_tokens: int, prompt_tokens: int, window: int, limit: int | None = None,
    dense_below: int = 0,
) -> int:  # fmt: skip
    """How many tokens of a wanted chunk to schedule now.

    Args:
        start: First token of the chunk, absolute.
        num_new_tokens: Tokens that the scheduler would take.
        prompt_tokens: Length of the prompt. Tokens after it were decoded one by one; after a
            preemption they are replayed as such, in a chunk that holds none of the prompt.
        window: Tokens per window.
        limit: Most tokens of a prompt that the recipe can take at once, in whole windows.
        dense_below: Context up to which nothing is retrieved, so that the limit does not matter.

    Returns:
        At most ``num_new_tokens``; 0 asks the scheduler to wait for a step with more room.
    """
    if start >= prompt_tokens:
        return num_new_tokens
    most = num_new_tokens if limit is None else max(limit, dense_below - start)
    end = start + min(num_new_tokens, most)
    if end >= prompt_tokens:
        return prompt_tokens - start
    return max(end // window * window - start, 0)


def _wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from kvplug.policies import make_stages

        original(self, vllm_config, *args, **kwargs)
        if is_selected(vllm_config):
            config = options_of(vllm_config)
            stages = make_stages(config.policy, config.options)
            limit = None
            if stages.segment is not None:
                limit = stages.segment.chunk_limit(config.local, config.window)
            setattr(self, WINDOW, config.window)
            setattr(self, LIMIT, limit)
            setattr(self, DENSE_BELOW, config.dense_below)
            margin = stages.hit_margin(config.local, config.window)
            for part in (self.kv_cache_manager, self.kv_cache_manager.coordinator):
                setattr(part, whole_hits.WINDOW, config.window)
                setattr(part, whole_hits.MARGIN, margin)
            self.need_mamba_block_aligned_split = True
            if config.offload is not None:
                # Blocks of a broken disk would be computed, written and lost again.
                self.recompute_kv_load_failures = False

    return __init__


def _wrap_split(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _mamba_block_aligned_split(
        self: Any,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        computed = (num_new_local_computed_tokens, num_external_computed_tokens)
        window = getattr(self, WINDOW, None)
        if window is None:
            return int(original(self, request, num_new_tokens, *computed))
        start = request.num_computed_tokens + sum(computed)
        return aligned_chunk(
            start, num_new_tokens, request.num_prompt_tokens, window, getattr(self, LIMIT),
            getattr(self, DENSE_BELOW),
        )  # fmt: skip

    return _mamba_block_aligned_split


_VLLM = ">=0.32,<0.33"
_WHY = "Chunks that split a window would make answers depend on the scheduler's load."
_UPSTREAM = "https://github.com/vllm-project/vllm/issues/57566"
_REMOVE_WHEN = "An attention backend can declare the alignment of prefill chunks."

PATCHES = [
    Patch(
        target="vllm.v1.core.sched.scheduler:Scheduler.__init__",
        vllm=_VLLM,
        why=_WHY,
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        fingerprint="c026802456720b43",
        wrap=_wrap_init,
    ),
    Patch(
        target="vllm.v1.core.sched.scheduler:Scheduler._mamba_block_aligned_split",
        vllm=_VLLM,
        why=_WHY,
        upstream=_UPSTREAM,
        remove_when=_REMOVE_WHEN,
        fingerprint="b2a08c774ae495bf",
        wrap=_wrap_split,
    ),
]
