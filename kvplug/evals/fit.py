"""Makes an example of a task as long as a context allows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from kvplug.errors import KvplugError
from kvplug.evals.tasks.base import Example, Materials, Task

TRIES = 12


class Fitted(NamedTuple):
    """An example and its length."""

    example: Example
    tokens: int


def fit(
    task: Task, context: int, seed: int, materials: Materials, count: Callable[[str], int]
) -> Fitted:
    """The longest example found whose prompt and answer take at most ``context`` tokens.

    Tokens grow about in proportion to a task's size, so a few steps of the secant rule do.

    Args:
        task: Whose.
        context: Tokens of prompt and answer.
        seed: Of the example: same seed, same example.
        materials: What it is made of.
        count: Tokens of a text, specials included.

    Raises:
        KvplugError: Even the smallest example is longer.
    """
    room = context - task.max_tokens

    def of_size(size: int) -> Fitted:
        example = task.make(random.Random(f"{task.name} {seed}"), size, materials)
        return Fitted(example, count(example.prompt))

    small, best = task.smallest, of_size(task.smallest)
    if best.tokens > room:
        raise KvplugError(
            f"Task {task.name!r} needs {best.tokens + task.max_tokens} tokens or more, which a "
            f"context of {context} does not hold."
        )
    least, small, large, size = best.tokens, task.smallest, None, task.smallest + 32
    for _ in range(TRIES):
        made = of_size(size)
        per_unit = max((made.tokens - least) / (size - task.smallest), 0.5)
        if made.tokens <= room:
            small, best = size, made
        else:
            large = size
        size = small + max(int((room - best.tokens) / per_unit), 1)
        if large is not None:
            size = min(size, large - 1)
        if size <= small:
            break
    return best
