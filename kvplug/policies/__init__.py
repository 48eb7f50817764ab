"""Recipes by name. Other packages add theirs under the entry-point group ``kvplug.policies``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError
from kvplug.policies.base import Policy
from kvplug.policies.dense import Dense
from kvplug.policies.quest import Quest
from kvplug.policies.simhash import SimHash
from kvplug.policies.streaming import Streaming
from kvplug.registry import Registry

POLICIES: Registry[type[Policy]] = Registry("policy")
POLICIES.register("dense")(Dense)
POLICIES.register("streaming")(Streaming)
POLICIES.register("quest")(Quest)
POLICIES.register("simhash")(SimHash)


def check(raw: Mapping[str, Any]) -> KvplugConfig:
    """Checks what a user wrote, the recipe and its options included, before anything starts.

    Raises:
        KvplugError: The first thing that is wrong with it.
    """
    config = KvplugConfig.parse(raw)
    make_policy(config.policy, config.options)
    return config


def make_policy(name: str, options: Mapping[str, Any]) -> Policy:
    """The recipe called ``name`` with the user's ``options``.

    Raises:
        KvplugError: Unknown name or option, or a value out of range.
    """
    for entry in entry_points(group="kvplug.policies"):
        if entry.name == name and name not in POLICIES:
            recipe = entry.load()
            if not (isinstance(recipe, type) and issubclass(recipe, Policy)):
                raise KvplugError(f"Entry point {entry.value!r} is not a kvplug Policy class.")
            POLICIES.register(name)(recipe)
    return POLICIES.get(name).from_options(name, options)
