"""Segment stage: from the token stream to events, runs of pages that belong together."""

from __future__ import annotations

from kvplug.registry import Registry, registry_of
from kvplug.segment.base import Segment
from kvplug.segment.surprise import Surprise
from kvplug.segment.uniform import Uniform

SEGMENTS: Registry[type[Segment]] = registry_of("segment", Uniform, Surprise)
