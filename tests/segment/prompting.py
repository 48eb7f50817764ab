"""Prompts whose every surprise a test chooses, brought through segmentation step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kvplug.pages import PageGeometry
from kvplug.segment.base import EventStarts, Segmenter
from kvplug.segment.cut import BEGINS
from kvplug.segment.deferred import DeferredTokens
from kvplug.segment.memory import SurpriseMemory
from kvplug.segment.surprise import Surprise
from kvplug.stage import Layer
from kvplug.step import Step
from kvplug.windows import cut_windows
from tests.made_up import layer_shape, reader_of

PAGE = 8
WINDOW = 16
PAGES = 120
HEADS, DIM = 2, 16


class Model:
    """Two tokens; a hidden state says how surprising token 0 is to come next."""

    def __init__(self) -> None:
        self.asked = 0
        """Tokens whose logits were computed."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``-log_softmax(logits)[0] == hidden[0]``."""
        self.asked += len(hidden)
        return torch.stack([torch.zeros(len(hidden)), hidden[:, 0].expm1().log()], 1)


class Part(NamedTuple):
    """What a request brings to a step."""

    pages: list[int]
    """Its physical pages."""
    start: int
    """Tokens before the step."""
    surprise: torch.Tensor
    """``[T]`` of the whole request; entry 0 is never used."""
    tokens: int
    prefilling: bool = True


class Cache:
    """One layer's memories and its keys, at pages that requests share as a test likes."""

    def __init__(self, dense_below: int = 0, **options: Any) -> None:
        shape = layer_shape(
            num_pages=PAGES, num_kv_heads=HEADS, page=PAGE, window=WINDOW, head_dim=DIM,
            dense_below=dense_below,
        )  # fmt: skip
        self.model = Model()
        self.keys = torch.zeros(PAGES, HEADS, DIM, PAGE)
        reader = reader_of(self.keys.view(PAGES * HEADS, 1, PAGE, DIM))
        self.layer = Layer(shape, {}, reader)
        segmenter = Surprise(**options).for_layer(self.layer)
        assert isinstance(segmenter, Segmenter)
        self.segmenter = segmenter
        self.memory = self.layer.shared(SurpriseMemory)
        self.events = self.layer.shared(EventStarts)
        self.deferred = self.layer.shared(DeferredTokens)

    def step(self, parts: Sequence[Part], keys: torch.Tensor | None = None) -> None:
        """One engine step: keys are written, then its output is learnt from.

        Args:
            parts: The batch.
            keys: ``[T, Hk, D]`` of a request, the same for all.
        """
        tables = torch.zeros((len(parts), max(len(p.pages) for p in parts) + 1), dtype=torch.int32)
        hidden, slots, written = [], [], []
        for row, part in enumerate(parts):
            tables[row, : len(part.pages)] = torch.tensor(part.pages, dtype=torch.int32)
            at = torch.arange(part.start, part.start + part.tokens)
            slots.append(torch.tensor(part.pages)[at // PAGE] * PAGE + at % PAGE)
            following = torch.cat([part.surprise[1:], torch.ones(1)])
            hidden.append(following[at])
            zeros = torch.zeros(part.tokens, HEADS, DIM)
            written.append(zeros if keys is None else keys[at])
        stops = np.cumsum([0, *(part.tokens for part in parts)], dtype=np.int32)
        geometry = PageGeometry(PAGE, WINDOW, 1, WINDOW, 2, 0, 2)
        prefilling = np.array([part.prefilling for part in parts])
        batch = (
            stops, np.array([p.start + p.tokens for p in parts], np.int32), prefilling, geometry,
        )  # fmt: skip
        step = Step(cut_windows(*batch), tables, 2, cut_windows(*batch, merge=False), prefilling)
        if max(p.start + p.tokens for p in parts) > self.layer.shape.dense_below:
            self.segmenter.prepare(step)
        self.write(torch.cat(written), torch.cat(slots))
        padded = torch.cat([*hidden, torch.full((3,), 77.0)])[:, None].repeat(1, 2)
        self.segmenter.learn(
            padded[: stops[-1]], torch.zeros(int(stops[-1]), dtype=torch.int32), self.model, step
        )

    def write(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Puts keys into the cache and tells the memories."""
        self.keys[slots // PAGE, :, :, slots % PAGE] = keys
        for memory in (self.memory, self.events, self.deferred):
            memory.forget(slots)

    def prefill(
        self, surprise: torch.Tensor, pages: list[int], chunk: int, start: int = 0,
        keys: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Brings a prompt through, from ``start`` on, in chunks."""
        for first in range(start, len(surprise), chunk):
            tokens = min(chunk, len(surprise) - first)
            self.step([Part(pages, first, surprise, tokens)], keys)

    def learnt(self, pages: list[int], tokens: int) -> tuple[torch.Tensor, list[int], list[int]]:
        """Surprises, boundary tokens and event starts of a request's tokens."""
        surprise = self.memory.surprise[pages].flatten()[:tokens]
        boundary = self.memory.boundary[pages].flatten()[:tokens]
        return surprise, marked(boundary & BEGINS), marked(self.events.starts[pages])


def marked(flags: torch.Tensor) -> list[int]:
    """Places of what is set."""
    return flags.nonzero().flatten().tolist()


def dealt(count: int, seed: int = 0) -> list[int]:
    """Physical pages for that many tokens, in no order."""
    order = torch.randperm(PAGES, generator=torch.Generator().manual_seed(seed))
    return order[: -(-count // PAGE)].tolist()
