"""The one exception that kvplug raises for things a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvplugError(ValueError):
    """A bad option, model or combination, told in one sentence that says what to change."""


def clause(sentence: str) -> str:
    """A sentence as a part of another: what pydantic says, behind a colon."""
    return sentence[0].lower() + sentence[1:]


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Ends an error about an unknown name: the nearest valid one, then all of them.

    Args:
        name: What the user wrote.
        known: The valid names.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid names: {', '.join(names)}"
