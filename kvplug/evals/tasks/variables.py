"""Variable tracking of RULER (Hsieh et al. 2024, arXiv 2404.06654): one chain of four hops."""

from __future__ import annotations

import itertools
import random
import string

from kvplug.evals.tasks.base import Example, Materials, Task, scattered
from kvplug.evals.tasks.needles import RULER

HOPS = 4
LETTERS = 5
"""Of a variable's name."""


class VariableTracking(Task):
    """A number goes from variable to variable; all that hold it are asked for.

    Deviation: the example that RULER puts before the question is left out.
    """

    name = "vt"
    source = f"{RULER}, vt"
    max_tokens = 60

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a sentence of noise."""
        names: dict[str, None] = {}
        while len(names) <= HOPS:
            names["".join(draw.choices(string.ascii_uppercase, k=LETTERS))] = None
        chain, value = list(names), str(draw.randrange(10000, 100000))
        hidden = [f"VAR {chain[0]} = {value}."]
        hidden += [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(chain)]
        text, _ = scattered(draw, materials.noise.sentences(draw, size), hidden)
        return Example(
            f"Follow the variables that are assigned in this text.\n{text}",
            f"Which variables hold the value {value}, directly or through another variable?",
            f"The variables that hold the value {value} are VAR",
            tuple(chain),
        )
