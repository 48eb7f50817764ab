"""Recipes by name: kvplug's own, and those of other packages (:mod:`.packages`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError
from kvplug.fields import build, option_names
from kvplug.policies.actqkv import ActQkv
from kvplug.policies.base import Policy, Stages
from kvplug.policies.channels import Channels
from kvplug.policies.dense import Dense
from kvplug.policies.emllm import EmLlm
from kvplug.policies.hax import Hax
from kvplug.policies.hcam import Hcam
from kvplug.policies.infllm import InfLlm
from kvplug.policies.packages import find_recipe
from kvplug.policies.quest import Quest
from kvplug.policies.simhash import SimHash
from kvplug.policies.stages import (
    REPLACEABLE,
    is_ignored,
    is_replacement,
    replace_stages,
    stages_of,
)
from kvplug.policies.streaming import Streaming
from kvplug.registry import Registry

POLICIES: Registry[type[Policy]] = Registry("policy")
POLICIES.register("dense")(Dense)
POLICIES.register("streaming")(Streaming)
POLICIES.register("quest")(Quest)
POLICIES.register("hcam")(Hcam)
POLICIES.register("channels")(Channels)
POLICIES.register("hax")(Hax)
POLICIES.register("infllm")(InfLlm)
POLICIES.register("simhash")(SimHash)
POLICIES.register("actqkv")(ActQkv)
POLICIES.register("emllm")(EmLlm)


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
    recipe, what = find_recipe(name, POLICIES), f"policy {name!r}"
    own = {key: value for key, value in options.items() if not is_replacement(key)}
    replacements = {key: value for key, value in options.items() if is_replacement(key)}
    for key in own:
        others = [other for other in POLICIES if key in option_names(POLICIES.get(other))]
        if others and key not in option_names(recipe):
            raise KvplugError(
                f"Option {key!r} belongs to policy {' and '.join(map(repr, others))}, not to "
                f"{name!r}."
            )
    policy = build(recipe, what, own, also=REPLACEABLE)
    stages = replace_stages(stages_of(policy, what), what, replacements)
    for key, value in own.items() if replacements else ():
        if is_ignored(policy, key, value, replacements, stages):
            raise KvplugError(
                f"Option {key!r} of {what} has no effect beside the stages that replace its own: "
                f"leave it out, or give it to the stage that replaces them."
            )
    return stages
