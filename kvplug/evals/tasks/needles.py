"""Needle tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654): one value, many keys, many values.

Depths are drawn evenly instead of from RULER's 40 steps. The document is framed by what it is and
what is asked of it in RULER's manner, in our own words.
"""

from __future__ import annotations

import random

from kvplug.evals.tasks.base import Example, Materials, Task, scattered

RULER = "RULER (Hsieh et al. 2024, arXiv 2404.06654)"


def needle(what: str, key: str, value: str) -> str:
    """The sentence that hides a value."""
    return f"One of the special magic {what} for {key} is: {value}."


def introduced(what: str, text: str) -> str:
    """A document, and that it hides something."""
    return f"Some special magic {what} are hidden in this text. Remember them.\n{text}"


class SingleNeedle(Task):
    """``niah_single_1``: one needle in noise."""

    name = "niah_single_1"
    source = f"{RULER}, niah_single_1"

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a sentence of noise."""
        wording = materials.wording
        key, value = wording.one(draw, "words"), wording.one(draw, "numbers")
        what = wording.kind("numbers")
        text, [depth] = scattered(
            draw, materials.noise.sentences(draw, size), [needle(what, key, value)]
        )
        return Example(
            introduced(what, text),
            f"What are all the special magic {what} for {key} in the text?",
            f"One of the special magic {what} for {key} is:",
            (value,),
            depth,
        )


class ManyKeys(Task):
    """Needles all over: the haystack is made of nothing else, one of them is asked for."""

    keys: str
    values: str

    smallest = 1

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a needle."""
        wording, what = materials.wording, materials.wording.kind(self.values)
        keys = wording.some(draw, self.keys, size)
        values = wording.some(draw, self.values, size)
        asked = draw.randrange(size)
        text = " ".join(needle(what, key, value) for key, value in zip(keys, values, strict=True))
        return Example(
            introduced(what, text),
            f"What is the special magic {what.rstrip('s')} for {keys[asked]} in the text?",
            f"One of the special magic {what} for {keys[asked]} is:",
            (values[asked],),
            asked / size,
        )


class ManyNumberKeys(ManyKeys):
    """``niah_multikey_2``: words to numbers."""

    name = "niah_multikey_2"
    source = f"{RULER}, niah_multikey_2"
    keys, values = "words", "numbers"


class ManyUuidKeys(ManyKeys):
    """``niah_multikey_3``: UUIDs to UUIDs."""

    name = "niah_multikey_3"
    source = f"{RULER}, niah_multikey_3"
    keys, values = "uuids", "uuids"
    max_tokens = 96


class ManyValues(Task):
    """``niah_multivalue``: one key with four values, all asked for."""

    name = "niah_multivalue"
    source = f"{RULER}, niah_multivalue"
    max_tokens = 128
    count = 4

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a sentence of text."""
        wording, what = materials.wording, materials.wording.kind("numbers")
        key = wording.one(draw, "words")
        values = wording.some(draw, "numbers", self.count)
        hidden = [needle(what, key, value) for value in values]
        text, _ = scattered(draw, materials.text.sentences(draw, size), hidden)
        return Example(
            introduced(what, text),
            f"What are all the special magic {what} for {key} in the text?",
            f"The special magic {what} for {key} are",
            tuple(values),
        )


class ManyQueries(Task):
    """``niah_multiquery``: four keys with a value each, all asked for."""

    name = "niah_multiquery"
    source = f"{RULER}, niah_multiquery"
    max_tokens = 128
    count = 4

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a sentence of text."""
        wording, what = materials.wording, materials.wording.kind("numbers")
        keys = wording.some(draw, "words", self.count)
        values = wording.some(draw, "numbers", self.count)
        pairs = list(zip(keys, values, strict=True))
        hidden = [needle(what, key, value) for key, value in pairs]
        text, _ = scattered(draw, materials.text.sentences(draw, size), hidden)
        draw.shuffle(pairs)
        listed = ", ".join(key for key, _ in pairs[:-1]) + f" and {pairs[-1][0]}"
        return Example(
            introduced(what, text),
            f"What are all the special magic {what} for {listed} in the text?",
            f"The special magic {what} for {listed} are",
            tuple(value for _, value in pairs),
        )
