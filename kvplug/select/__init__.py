"""Select stage: from page scores to the far pages that a window attends to."""

from __future__ import annotations

from kvplug.registry import Registry, registry_of
from kvplug.select.base import Select
from kvplug.select.events import Events
from kvplug.select.top_pages import TopPages
from kvplug.select.union import Union

SELECTS: Registry[type[Select]] = registry_of("select", TopPages, Events, Union)
