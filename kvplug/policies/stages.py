"""Stages by name, and recipes whose stages a user replaces: any combination that makes sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvplug.budget import BUDGETS
from kvplug.errors import KvplugError, nearest_name
from kvplug.fields import build
from kvplug.index import INDEXES
from kvplug.policies.base import Stages
from kvplug.probe import PROBES
from kvplug.probe.base import Probe
from kvplug.probe.union import UnionProbe
from kvplug.registry import Registry
from kvplug.segment import SEGMENTS
from kvplug.select import SELECTS
from kvplug.stage import Stage

REGISTRIES: dict[str, Registry[type[Stage]]] = {
    "segment": SEGMENTS,
    "index": INDEXES,
    "probe": PROBES,
    "budget": BUDGETS,
    "select": SELECTS,
}
MERGES = ("exact", "coarse")


def is_replacement(option: str) -> bool:
    """Whether an option replaces a stage instead of being a recipe's own."""
    return option in REGISTRIES or option == "merge"


def replace_stages(stages: Stages, what: str, options: Mapping[str, Any]) -> Stages:
    """``stages`` with those that ``options`` names replaced.

    Args:
        stages: A recipe's own.
        what: What messages call the recipe.
        options: Stage kind -> a name, or ``{"name": ..., field: value}``; probes may be a list of
            such, which are used together. ``merge`` -> ``exact`` or ``coarse``.

    Raises:
        KvplugError: An unknown stage or field, or stages that do not go together.
    """
    if options and stages.index is None:
        raise KvplugError(f"{what[0].upper() + what[1:]} has no stages to replace.")
    changed: dict[str, Any] = {}
    for kind, value in options.items():
        if kind == "merge":
            if value not in MERGES:
                raise KvplugError(f"Unknown merge {value!r}: {nearest_name(str(value), MERGES)}.")
            changed[kind] = value
        elif kind == "probe" and isinstance(value, list):
            probes = [make_stage(kind, part) for part in value]
            changed[kind] = UnionProbe(tuple(p for p in probes if isinstance(p, Probe)))
        else:
            changed[kind] = make_stage(kind, value)
    return replace(stages, **changed)


def make_stage(kind: str, value: Any) -> Stage:
    """One stage from what a user wrote: a name, or an object with a name.

    Raises:
        KvplugError: It is something else, or wrong.
    """
    written = {"name": value} if isinstance(value, str) else value
    if not isinstance(written, dict) or not isinstance(written.get("name"), str):
        raise KvplugError(
            f"Option {kind!r} must be the name of a {kind} stage, or an object like "
            f'{{"name": ..., field: value}}, not {value!r}.'
        )
    fields = {key: field for key, field in written.items() if key != "name"}
    name = written["name"]
    return build(REGISTRIES[kind].get(name), f"{kind} {name!r}", fields)
