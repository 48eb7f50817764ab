"""Recipes of other packages, named by the entry-point group ``kvplug.policies``.

A package declares in its ``pyproject.toml``::

    [project.entry-points."kvplug.policies"]
    mine = "its.module:Mine"

where ``Mine`` is a :class:`~kvplug.policies.base.Policy`, and a user says ``policy: mine``. Nothing
of a package is imported before its recipe is asked for.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from kvplug.errors import KvplugError, nearest_name
from kvplug.policies.base import Policy
from kvplug.registry import Registry

GROUP = "kvplug.policies"


def find_recipe(name: str, own: Registry[type[Policy]]) -> type[Policy]:
    """The recipe called ``name``: kvplug's own, or another package's.

    Args:
        name: What the user asks for.
        own: kvplug's own recipes.

    Raises:
        KvplugError: There is none, more than one (which a user could not tell apart), or it is no
            recipe.
    """
    entries = entry_points(group=GROUP)
    claims = [entry for entry in entries if entry.name == name]
    if name in own and claims:
        raise KvplugError(
            f"Policy {name!r} is kvplug's own, but {_source(claims[0])} claims the name too: "
            f"uninstall that package, or have its recipe renamed."
        )
    if len(claims) > 1:
        raise KvplugError(
            f"Policy {name!r} is claimed by {' and by '.join(map(_source, claims))}: uninstall all "
            f"but one."
        )
    if claims:
        return _load(claims[0])
    if name not in own:
        known = nearest_name(name, [*own, *(entry.name for entry in entries)])
        raise KvplugError(f"Unknown policy {name!r}: {known}.")
    return own.get(name)


def _source(entry: EntryPoint) -> str:
    """Where an entry point comes from, in words."""
    package = f"package {entry.dist.name!r}" if entry.dist is not None else "another package"
    return f"{package} ({entry.value})"


def _load(entry: EntryPoint) -> type[Policy]:
    """Imports a recipe.

    Raises:
        KvplugError: It cannot be imported, or is something else.
    """
    try:
        recipe = entry.load()
    except Exception as error:
        raise KvplugError(
            f"Policy {entry.name!r} of {_source(entry)} cannot be imported: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not (isinstance(recipe, type) and issubclass(recipe, Policy)):
        raise KvplugError(
            f"Policy {entry.name!r} of {_source(entry)} is no subclass of "
            f"kvplug.policies.base.Policy."
        )
    return recipe
