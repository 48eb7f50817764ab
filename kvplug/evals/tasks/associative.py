"""Associative recall of the state-space literature, as text: MQAR and joint recall."""

from __future__ import annotations

import random

import numpy as np

from kvplug.evals.tasks.base import Example, Materials, Task
from kvplug.models.words import word_sections

POWER = 0.01
"""MQAR: a gap of x slots has probability in proportion to x ^ (POWER - 1)."""
PAIRS = 64
"""MQAR: the most that the paper uses."""
VALUES = 16
"""Joint recall: different values."""
FEWEST, MOST = 5, 16
"""Joint recall: contexts, and keys of each."""


def gaps(seed: int, slots: int, count: int) -> list[int]:
    """``count`` different slots 0 .. slots - 1 by MQAR's power law, ascending.

    As in zoology: slot x has probability in proportion to ``(x + 1) ^ (POWER - 1)``, without
    replacement.
    """
    shares = np.arange(1, slots + 1, dtype=np.float64) ** (POWER - 1)
    generator = np.random.default_rng(seed)
    drawn = generator.choice(slots, size=count, replace=False, p=shares / shares.sum())
    return sorted(int(slot) for slot in drawn)


class MultiQueryRecall(Task):
    """``mqar``: pairs first, then each key once more, at a gap by a power law.

    The paper's model predicts every value where it is queried. A prompt has one end, so here the
    key that is queried last is asked for, behind ``size`` slots; the others' values are written
    out where they are queried. Slots without a query are filler sentences.
    """

    name = "mqar"
    source = "MQAR (Arora et al. 2024, arXiv 2312.04927), in text form"
    max_tokens = 8
    smallest = 8

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a slot."""
        words, count = word_sections(), min(PAIRS, size // 2)
        keys = draw.sample(words["nouns"], count)
        values = [draw.choice(words["adjectives"]) for _ in keys]
        said = [f"The code of {k} is {v}." for k, v in zip(keys, values, strict=True)]
        order = draw.sample(range(count), count)
        slots = materials.text.sentences(draw, size)
        for slot, number in zip(gaps(draw.getrandbits(32), size, count - 1), order, strict=False):
            slots[slot] = said[number]
        asked = order[-1]
        return Example(
            " ".join([*said, *slots]),
            f"What is the code of {keys[asked]}?",
            f"The code of {keys[asked]} is",
            (values[asked],),
            0.0,
        )


class JointRecall(Task):
    """``joint_recall``: the value of a key depends on the context that it is read in.

    Numbers of contexts and keys are drawn from the generator's 5 to 16 and values from 16; the
    document grows by sentences between the contexts. Key names are shared by all contexts.
    """

    name = "joint_recall"
    source = "Joint recall of HAX (Zhan et al. 2025, arXiv 2507.00449), in text form"
    chance = 1 / VALUES
    max_tokens = 8

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a sentence of filler."""
        words = word_sections()
        contexts = draw.sample(words["places"], draw.randint(FEWEST, MOST))
        keys = draw.sample(words["nouns"], draw.randint(FEWEST, MOST))
        values = draw.sample(words["colors"], VALUES)
        table = {(c, k): draw.choice(values) for c in contexts for k in keys}
        blocks = [
            " ".join(f"In context {c}, {k} is {table[c, k]}." for k in draw.sample(keys, len(keys)))
            for c in contexts
        ]
        filler = materials.text.sentences(draw, size)
        share = size // len(blocks)
        parts = [
            part
            for i, block in enumerate(blocks)
            for part in (block, *filler[i * share : (i + 1) * share])
        ]
        parts += filler[share * len(blocks) :]
        number = draw.randrange(len(contexts))
        context, key = contexts[number], draw.choice(keys)
        return Example(
            " ".join(parts),
            f"What is {key} in context {context}?",
            f"In context {context}, {key} is",
            (table[context, key],),
            number / len(contexts),
            tuple(values),
        )
