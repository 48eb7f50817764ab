"""Causal centring: the mean key and query of a request's first window, frozen from then on.

HAX (arXiv 2507.00449) centres queries and keys by their means over the whole sequence before it
hashes them, so that sign bits split the cloud in half wherever it lies. That mean looks ahead, and
moves with every token. Here it is the mean over the prompt's part of the first window: known
before anything is retrieved, the same for every chunking, and never changed by decoded tokens.

HAX's code then normalises along the sequence instead of along each vector (the default axis of
``F.normalize``), which rescales features. The norm of a vector has no say in its sign bits, so
here only the mean is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.stage import Layer, Memory, Passage

if TYPE_CHECKING:
    from kvplug.step import Step

LANES = 16
"""Floats in a vector register, to estimate work."""


class Centre(Memory):
    """Means of each request, on the page of its first token; other pages' rows are never touched.

    A request whose first window is in the prefix cache finds them on the shared page. They need no
    forgetting: a page that takes a new request's first token gets that request's means in the same
    step, before anything reads them.
    """

    def __init__(self, layer: Layer) -> None:
        """Allocates a row per page (untouched pages cost no memory)."""
        super().__init__(layer)
        shape = self.shape
        self.keys = torch.zeros(shape.num_pages, shape.num_kv_heads, shape.head_dim)
        """``[pages, Hk, D]`` mean keys."""
        self.queries = torch.zeros(shape.num_pages, shape.num_heads, shape.head_dim)
        """``[pages, H, D]`` mean queries."""
        self.keys_host = self.keys.numpy()
        self.queries_host = self.queries.numpy()
        self._called = False

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """See the class."""
        return (self.keys, self.queries)

    def nbytes(self) -> float:
        """With one request that fills the cache: a request takes one page's rows."""
        return self.keys[0].nbytes + self.queries[0].nbytes

    def watch(self, passage: Passage) -> None:
        """Takes the means of every prompt that begins in this step."""
        step, stream = passage.step, passage.step.stream
        begins = np.flatnonzero(stream.context_end == stream.num_tokens)
        # No prompt begins in a warm-up's step, and it must compile what a step can call.
        if len(begins) == 0 and self._called:
            return
        self._called = True
        counts = stream.num_tokens[begins]
        starts = np.cumsum(counts) - counts
        places = np.arange(counts.sum()) + np.repeat(stream.token_start[begins] - starts, counts)
        tokens = torch.from_numpy(places)
        queries, keys = passage.queries_at(tokens), passage.keys_at(tokens)
        _take_means(
            (queries.numel() + keys.numel()) // LANES, queries.numpy(), keys.numpy(),
            starts, counts, stream.request[begins], step.block_table_host,
            self.queries_host, self.keys_host,
        )  # fmt: skip


@njit(cache=True)
def _mean(vectors, first, count, head, out):  # type: ignore[no-untyped-def]
    """``out = mean of vectors[first : first + count, head]``."""
    out[:] = 0
    for token in range(first, first + count):
        for d in range(out.shape[0]):
            out[d] += vectors[token, head, d]
    for d in range(out.shape[0]):
        out[d] /= np.float32(count)


@compiled()
def _take_means(  # type: ignore[no-untyped-def]
    queries, keys, starts, counts, request, block_table, mean_queries, mean_keys
):
    """Means of windows, one head a task."""
    heads, kv_heads = queries.shape[1], keys.shape[1]
    for task in prange(starts.shape[0] * (heads + kv_heads)):
        s, head = task // (heads + kv_heads), task % (heads + kv_heads)
        page = block_table[request[s], 0]
        if head < heads:
            _mean(queries, starts[s], counts[s], head, mean_queries[page, head])
        else:
            head -= heads
            _mean(keys, starts[s], counts[s], head, mean_keys[page, head])


@njit(cache=True, inline="always")
def subtract(vector, mean, out):  # type: ignore[no-untyped-def]
    """``out = vector - mean``."""
    for d in range(out.shape[0]):
        out[d] = vector[d] - mean[d]


def centre_reference(vectors: torch.Tensor, step: Step) -> list[tuple[int, torch.Tensor]]:
    """Twin of :meth:`Centre.watch` in plain torch.

    Args:
        vectors: ``[T, heads, D]`` keys or queries of the step.
        step: Its stream.

    Returns:
        For each prompt that begins, the physical page and the ``[heads, D]`` mean.
    """
    stream, means = step.stream, []
    for s in range(len(stream)):
        start, count = int(stream.token_start[s]), int(stream.num_tokens[s])
        if int(stream.context_end[s]) == count:
            page = int(step.block_table[int(stream.request[s]), 0])
            means.append((page, vectors[start : start + count].mean(0)))
    return means
