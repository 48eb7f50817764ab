"""Caches prefixes in whole, finished windows, and ends hits at whole windows.

A hit that ends inside a window would leave a part of it to be probed with other queries than the
whole one. And pages of a prompt's partial last window were probed as such, and must not become the
beginning of another request's whole one.

Some recipes complete what they store for a page from later queries, up to the size of the local
region (InfLLM's accumulated attention, say). Such a page is cached once its own request has gone
that much further. To end hits before the end of what is cached would not do: vLLM's cache may hold
a page twice, put together a prefix of pages of several requests, and among them one whose request
was preempted or aborted before the page was finished.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvplug.patches.record import Patch

WINDOW = "kvplug_window"
"""Attribute of a cache manager and its coordinator that serve kvplug: tokens of a window."""
MARGIN = "kvplug_margin"
"""Attribute of such a coordinator: tokens, in whole windows, that a page is finished by."""


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_computed_blocks(self: Any, request: Any) -> tuple[Any, int, int]:
        blocks, tokens, boundary = original(self, request)
        window = getattr(self, WINDOW, None)
        if window is None or not tokens:
            return blocks, tokens, boundary
        wanted = tokens // window * window
        while tokens > wanted:
            # Looked up again and not cut: groups with a sliding window keep other blocks for a
            # shorter hit, and may make it shorter still.
            found, tokens, _ = self.coordinator.find_longest_cache_hit(request.block_hashes, wanted)
            blocks, boundary = self.create_kv_cache_blocks(found), 0
            wanted = tokens // window * window
        return blocks, tokens, boundary

    return get_computed_blocks


def _wrap_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cache_blocks(self: Any, request: Any, num_computed_tokens: int) -> None:
        window = getattr(self, WINDOW, None)
        if window is not None:
            finished = max(num_computed_tokens - getattr(self, MARGIN), 0)
            num_computed_tokens = finished // window * window
        original(self, request, num_computed_tokens)

    return cache_blocks


PATCHES = [
    Patch(
        target="vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks",
        vllm=">=0.32,<0.33",
        why="Pages of a partial window would be shared as the beginning of a whole one, which was "
        "probed with other queries; and a recipe that learns from later queries would share "
        "unfinished pages.",
        upstream="https://github.com/vllm-project/vllm/issues/57566",
        remove_when="An attention backend can say in what units, and when, a prefix may be cached.",
        fingerprint="8a801b2adf06ab1a",
        wrap=_wrap_cache,
    ),
    Patch(
        target="vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks",
        vllm=">=0.32,<0.33",
        why="A window entered half way would be probed with other queries: a request would get "
        "another answer on a prefix hit than cold.",
        upstream="https://github.com/vllm-project/vllm/issues/57566",
        remove_when="An attention backend can say how much of a cached prefix it can reuse.",
        fingerprint="77f434d88d573bfe",
        wrap=_wrap,
    ),
]
