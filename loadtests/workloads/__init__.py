"""Workloads by name."""

from __future__ import annotations

from kvplug.loadtests.workloads.base import Workload
from kvplug.loadtests.workloads.mixed import Mixed
from kvplug.loadtests.workloads.multi_turn import MultiTurn
from kvplug.loadtests.workloads.needles import Needles
from kvplug.loadtests.workloads.shared_prefix import SharedPrefix
from kvplug.registry import Registry, registry_of

WORKLOADS: Registry[Workload] = registry_of(
    "workload", Needles(), SharedPrefix(), MultiTurn(), Mixed()
)
