"""Recipes by name. Other packages add theirs under the entry-point group ``kvplug.policies``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError
from kvplug.fields import build
from kvplug.policies.base import Policy, Stages
from kvplug.policies.dense import Dense
from kvplug.policies.hcam import Hcam
from kvplug.policies.quest import Quest
from kvplug.policies.simhash import SimHash
from kvplug.policies.stages import is_replacement, replace_stages
from kvplug.policies.streaming import Streaming
from kvplug.registry import Registry

POLICIES: Registry[type[Policy]] = Registry("policy")
POLICIES.register("dense")(Dense)
POLICIES.register("streaming")(Streaming)
POLICIES.register("quest")(Quest)
POLICIES.register("hcam")(Hcam)
POLICIES.register("simhash")(SimHash)


def check(raw: Mapping[str, Any]) -> KvplugConfig:
    """Checks what a user wrote, the recipe and its options included, before anything starts.

    Raises:
        KvplugError: The first thing that is wrong with it.
    """
    config = KvplugConfig.parse(raw)
    make_stages(config.policy, config.options)
    return config


def make_stages(name: str, options: Mapping[str, Any]) -> Stages:
    """The stages of the recipe called ``name``.

    Args:
        name: A recipe of kvplug's or of another package's.
        options: The recipe's own fields, and stages that replace its own (:mod:`.stages`).

    Raises:
        KvplugError: Unknown name or option, a value out of range, or stages that do not fit.
    """
    for entry in entry_points(group="kvplug.policies"):
        if entry.name == name and name not in POLICIES:
            recipe = entry.load()
            if not (isinstance(recipe, type) and issubclass(recipe, Policy)):
                raise KvplugError(f"Entry point {entry.value!r} is not a kvplug Policy class.")
            POLICIES.register(name)(recipe)
    what = f"policy {name!r}"
    fields = {key: value for key, value in options.items() if not is_replacement(key)}
    replacements = {key: value for key, value in options.items() if is_replacement(key)}
    policy = build(POLICIES.get(name), what, fields)
    return replace_stages(policy.stages(), what, replacements)
