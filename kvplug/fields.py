"""Building a frozen dataclass from what a user wrote, with one-sentence errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from kvplug.errors import KvplugError, nearest_name

T = TypeVar("T")

WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
}
"""Types that options have, as a user would call them."""
LARGEST = 2**31
"""No count that an option gives is larger; larger ones would wrap in compiled code."""


def build(cls: type[T], what: str, options: Mapping[str, Any], also: Iterable[str] = ()) -> T:
    """``cls(**options)``, where every name and type is checked first.

    Args:
        cls: A dataclass whose fields are plain types.
        what: What messages call it, such as ``policy 'quest'``.
        options: Field values; a whole number is taken for a float.
        also: Further names that the user could have meant.

    Raises:
        KvplugError: An unknown option, a wrong type, or a value out of range.
    """
    types = get_type_hints(cls)
    known = option_names(cls)
    values = {}
    for key, value in options.items():
        if key not in known:
            names = [*known, *also]
            hint = nearest_name(str(key), names) if names else "it has none"
            raise KvplugError(f"Unknown option {key!r} of {what}: {hint}.")
        values[key] = _checked(value, types[key], f"Option {key!r} of {what}")
    return cls(**values)


def option_names(cls: type) -> list[str]:
    """Names of a dataclass's fields, in order."""
    return [field.name for field in fields(cls) if field.init]


def _checked(value: Any, wanted: Any, what: str) -> Any:
    """``value`` as a ``wanted``.

    Raises:
        KvplugError: It is something else, or no number that could be meant.
    """
    if wanted is float and type(value) is int and abs(value) < LARGEST:
        value = float(value)
    if type(value) is not wanted:
        kind = WORDS.get(wanted, str(getattr(wanted, "__name__", wanted)))
        raise KvplugError(f"{what} must be {kind}, not {value!r}.")
    if wanted is float and not math.isfinite(value):
        raise KvplugError(f"{what} must be finite, not {value!r}.")
    if wanted is int and abs(value) >= LARGEST:
        raise KvplugError(f"{what} must be below {LARGEST}, not {value!r}.")
    return value
