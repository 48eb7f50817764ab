"""Stages by name, and recipes whose stages a user replaces: any combination that makes sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from kvplug.budget import BUDGETS
from kvplug.errors import KvplugError, nearest_name
from kvplug.fields import build
from kvplug.index import INDEXES
from kvplug.policies.base import Policy, Stages
from kvplug.probe import PROBES
from kvplug.probe.union import UnionProbe
from kvplug.registry import Registry
from kvplug.segment import SEGMENTS
from kvplug.select import SELECTS

REGISTRIES: dict[str, Registry[Any]] = {
    "segment": SEGMENTS,
    "index": INDEXES,
    "probe": PROBES,
    "budget": BUDGETS,
    "select": SELECTS,
}
MERGES = ("exact", "coarse")
ATTENDS = ("triton", "flash", "xformers")
ON_CUDA = ("attend", "graphs")
"""Options of attention itself, which recipes without an index have too."""
REPLACEABLE = (*REGISTRIES, "merge", *ON_CUDA)
"""Options that replace a part of a recipe instead of being its own."""


def is_replacement(option: str) -> bool:
    """Whether an option replaces a part of a recipe instead of being its own."""
    return option in REPLACEABLE


def stages_of(policy: Policy, what: str) -> Stages:
    """A recipe's own stages.

    Args:
        policy: The recipe, with its options.
        what: What messages call it.

    Raises:
        KvplugError: It gives something else.
    """
    stages = policy.stages()
    if not isinstance(stages, Stages):
        raise KvplugError(f"{_sentence(what)} gives no kvplug Stages, but {stages!r}.")
    return stages


def replace_stages(stages: Stages, what: str, options: Mapping[str, Any]) -> Stages:
    """``stages`` with those that ``options`` names replaced.

    Args:
        stages: A recipe's own.
        what: What messages call the recipe.
        options: Stage kind -> a name, or ``{"name": ..., field: value}``; probes may be a list of
            such, which are used together, and a segment None, for doing without. ``merge`` ->
            ``exact`` or ``coarse``, ``attend`` -> ``triton``, ``flash`` or ``xformers``,
            ``graphs`` -> a bool.

    Raises:
        KvplugError: An unknown stage or field, or stages that do not go together.
    """
    if stages.always_dense:
        idle = list(options)
    else:
        idle = [option for option in options if stages.index is None and option not in ON_CUDA]
    if idle:
        named = " and ".join(map(repr, idle))
        raise KvplugError(
            f"{_sentence(what)} retrieves nothing, so {named} would have no effect: leave it out, "
            f"or choose a policy that retrieves."
        )
    changed: dict[str, Any] = {}
    for kind, value in options.items():
        if kind == "merge":
            changed[kind] = _one_of(kind, value, MERGES)
        elif kind == "attend":
            changed[kind] = _one_of(kind, value, ATTENDS)
        elif kind == "graphs":
            changed[kind] = _yes_or_no(kind, value)
        elif kind == "segment" and value is None:
            changed[kind] = None
        elif kind == "probe" and isinstance(value, list):
            changed[kind] = UnionProbe(tuple(make_stage(kind, part) for part in value))
        else:
            changed[kind] = make_stage(kind, value)
    return replace(stages, **changed)


def make_stage(kind: str, value: Any) -> Any:
    """One stage from what a user wrote: a name, or an object with a name.

    Raises:
        KvplugError: It is something else, or wrong.
    """
    written = {"name": value} if isinstance(value, str) else value
    if not isinstance(written, Mapping) or not isinstance(written.get("name"), str):
        raise KvplugError(
            f"Option {kind!r} must be the name of a stage, or an object like "
            f'{{"name": ..., field: value}}, not {value!r}.'
        )
    own = {key: field for key, field in written.items() if key != "name"}
    name = written["name"]
    return build(REGISTRIES[kind].get(name), f"{kind} {name!r}", own)


def is_ignored(
    policy: Policy, option: str, value: Any, replacements: Mapping[str, Any], stages: Stages
) -> bool:
    """Whether a recipe's own option is lost, because all that it would change was replaced.

    Args:
        policy: The recipe, with its options.
        option: One of them.
        value: What the user gave it.
        replacements: What the user replaced.
        stages: What came of both.
    """
    default = next(field.default for field in fields(policy) if field.name == option)
    if default is MISSING or value == default:
        return False
    try:
        without = replace(policy, **{option: default}).stages()
        return replace_stages(without, "", replacements) == stages
    except KvplugError:  # the recipe needs the option to hold together
        return False


def _one_of(kind: str, value: Any, names: tuple[str, ...]) -> str:
    """The name of a merge, or of what attends.

    Raises:
        KvplugError: It is none.
    """
    if not isinstance(value, str) or value not in names:
        raise KvplugError(f"Unknown {kind} {value!r}: {nearest_name(str(value), names)}.")
    return value


def _yes_or_no(kind: str, value: Any) -> bool:
    """A switch.

    Raises:
        KvplugError: It is none.
    """
    if not isinstance(value, bool):
        raise KvplugError(f"Option {kind!r} must be true or false, not {value!r}.")
    return value


def _sentence(what: str) -> str:
    """``what`` as the beginning of a sentence."""
    return what[:1].upper() + what[1:]
