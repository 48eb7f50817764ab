"""What a recipe is: one implementation named for each stage of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from kvplug.budget.base import Budget
from kvplug.budget.fixed import FixedBudget
from kvplug.errors import KvplugError, nearest_name
from kvplug.index.base import IndexShape, PageIndex
from kvplug.probe.base import Probe
from kvplug.select.base import Select
from kvplug.select.top_pages import TopPages


@dataclass(frozen=True)
class Stages:
    """The stages of one recipe; ``None`` where it has no use for a stage."""

    make_index: Callable[[IndexShape], PageIndex] | None
    probe: Probe | None
    budget: Budget = FixedBudget()
    select: Select = TopPages()
    always_dense: bool = False
    """Attend to everything, by the platform's own path."""


@dataclass(frozen=True)
class Policy:
    """A recipe. Subclasses are frozen dataclasses whose fields are the user's ``options``.

    Raises (from ``__post_init__`` of subclasses):
        KvplugError: An option is out of range.
    """

    def stages(self) -> Stages:
        """The recipe's stages, built from its options."""
        raise NotImplementedError

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any]) -> Policy:
        """Builds the recipe from the user's ``options``.

        Args:
            name: The recipe's name, for messages.
            options: Field values.

        Raises:
            KvplugError: An unknown option, a wrong type, or a value out of range.
        """
        types = get_type_hints(cls)
        known = [field.name for field in fields(cls)]
        for key, value in options.items():
            if key not in known:
                names = nearest_name(key, known) if known else "it has none"
                raise KvplugError(f"Unknown option {key!r} of policy {name!r}: {names}.")
            if type(value) is not types[key]:
                raise KvplugError(
                    f"Option {key!r} of policy {name!r} must be {types[key].__name__}, "
                    f"not {value!r}."
                )
        return cls(**options)
