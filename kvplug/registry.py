"""A name-to-implementation table whose unknown-name error names the nearest entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from kvplug.errors import KvplugError, nearest_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Named implementations of one kind.

    Args:
        kind: What the entries are, in the singular; error messages use it.
    """

    def __init__(self, kind: str) -> None:
        """Starts empty."""
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its argument under ``name`` and returns it unchanged.

        Raises:
            KvplugError: ``name`` is taken by something else.
        """

        def add(entry: T) -> T:
            taken = self._entries.get(name)
            if taken is not None and taken is not entry:
                raise KvplugError(f"{self.kind} {name!r} is registered twice: {taken} and {entry}.")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            KvplugError: There is none; the message gives the nearest name.
        """
        if name not in self._entries:
            raise KvplugError(f"Unknown {self.kind} {name!r}: {nearest_name(name, self)}.")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Names, sorted."""
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        """Whether ``name`` is registered."""
        return name in self._entries


def registry_of(kind: str, *entries: Any) -> Registry[Any]:
    """A registry of classes that carry their own ``name``."""
    registry: Registry[Any] = Registry(kind)
    for entry in entries:
        registry.register(entry.name)(entry)
    return registry
