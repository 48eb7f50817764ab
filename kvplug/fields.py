"""Building a frozen dataclass from what a user wrote, with one-sentence errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from kvplug.errors import KvplugError, nearest_name

T = TypeVar("T")


def build(cls: type[T], what: str, options: Mapping[str, Any]) -> T:
    """``cls(**options)``, where every name and type is checked first.

    Args:
        cls: A dataclass whose fields are plain types.
        what: What messages call it, such as ``policy 'quest'``.
        options: Field values; a whole number is taken for a float.

    Raises:
        KvplugError: An unknown option, a wrong type, or a value out of range.
    """
    types = get_type_hints(cls)
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    values = dict(options)
    for key, value in options.items():
        if key not in known:
            names = nearest_name(key, known) if known else "it has none"
            raise KvplugError(f"Unknown option {key!r} of {what}: {names}.")
        if types[key] is float and type(value) is int:
            values[key] = float(value)
        elif type(value) is not types[key]:
            raise KvplugError(
                f"Option {key!r} of {what} must be {types[key].__name__}, not {value!r}."
            )
    return cls(**values)
