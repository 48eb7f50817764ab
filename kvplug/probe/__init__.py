"""Probe stage: what stands for a window's queries when pages are scored."""

from __future__ import annotations

from kvplug.probe.activation import ActivationProbe
from kvplug.probe.base import Probe
from kvplug.probe.last_activated import LastAndActivatedProbe
from kvplug.probe.mean import MeanProbe
from kvplug.registry import Registry, registry_of

PROBES: Registry[type[Probe]] = registry_of(
    "probe", ActivationProbe, LastAndActivatedProbe, MeanProbe
)
