"""Retrieval tasks of InfiniteBench (Zhang et al. 2024, arXiv 2402.13718)."""

from __future__ import annotations

import itertools
import json
import random

from kvplug.evals.tasks.base import Example, Materials, Task, scattered

INFINITE = "InfiniteBench (Zhang et al. 2024, arXiv 2402.13718)"


class PassKey(Task):
    """``passkey``: five digits in noise."""

    name = "passkey"
    source = f"{INFINITE}, PassKey"
    max_tokens = 16

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a sentence of noise."""
        key = str(draw.randrange(10000, 100000))
        hidden = f"The pass key is {key}. Remember it. {key} is the pass key."
        text, [depth] = scattered(draw, materials.noise.sentences(draw, size), [hidden])
        return Example(
            f"There is an important fact in much text that says nothing. Find it.\n{text}",
            "What is the pass key?",
            "The pass key is",
            (key,),
            depth,
        )


class NumberString(Task):
    """``number_string``: ten digits of which many repeat."""

    name = "number_string"
    source = f"{INFINITE}, Number String"
    max_tokens = 24
    digits, runs = 10, 4

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a sentence of noise."""
        number = self.number(draw)
        hidden = f"The sequence of digits is {number}. Remember it. {number} is the sequence."
        text, [depth] = scattered(draw, materials.noise.sentences(draw, size), [hidden])
        return Example(
            f"There is an important fact in much text that says nothing. Find it.\n{text}",
            "What is the sequence of digits?",
            "The sequence of digits is",
            (number,),
            depth,
        )

    def number(self, draw: random.Random) -> str:
        """Ten digits in four runs of one digit each, neighbours different."""
        cuts = [0, *sorted(draw.sample(range(1, self.digits), self.runs - 1)), self.digits]
        text, last = "", ""
        for start, stop in itertools.pairwise(cuts):
            last = draw.choice([digit for digit in "0123456789" if digit != last])
            text += last * (stop - start)
        return text


class KeyValues(Task):
    """``kv_retrieval``: one value of a JSON object of UUIDs; plainly worded, without its quotes."""

    name = "kv_retrieval"
    source = f"{INFINITE}, KV Retrieval"
    max_tokens = 96
    smallest = 1

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a pair."""
        wording = materials.wording
        keys = wording.some(draw, "uuids", size)
        values = wording.some(draw, "uuids", size)
        asked = draw.randrange(size)
        pairs = json.dumps(dict(zip(keys, values, strict=True)))
        question, opening = f'Key: "{keys[asked]}"', f'The value is: "{keys[asked]}": "'
        if wording.plain:
            pairs, question, opening = (t.replace('"', "") for t in (pairs, question, opening))
        return Example(
            f"Find the value of a key in this JSON object.\n{pairs}",
            question,
            opening,
            (values[asked],),
            asked / size,
        )
