"""User options: the ``kvplug`` object inside vLLM's ``--additional-config``.

Every field of the public interface is declared, documented and checked here and nowhere else; the
command line reads its defaults and help texts from this class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvplug.errors import KvplugError, clause, nearest_name

DEFAULT_POLICY = "channels"
"""What docs/quality.md chose."""
DENSE_LAYERS_FROM = 8
"""``dense_layers: "auto"`` keeps two layers dense in models with at least this many layers."""


class OffloadConfig(BaseModel):
    """Where pages live that are not hot. Sizes are GiB per worker."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tier: Literal["host", "disk"] = Field(description="what holds the cache: host or disk")
    hot_gib: float = Field(2.0, gt=0, description="GiB of pages that attention reads")
    cold_gib: float = Field(64.0, gt=0, description="GiB of the paged cache")
    path: str | None = Field(None, description="folder of the cache's file, for tier disk")
    eviction: Literal["lru", "mass", "event"] = Field(
        "lru", description="which hot page gives way: lru, mass or event"
    )
    prefetch: list[Literal["last", "events", "next_layer"]] = Field(
        default_factory=list, description="pages read ahead of need: last, events, next_layer"
    )

    @model_validator(mode="after")
    def _check_path(self) -> OffloadConfig:
        if (self.tier == "disk") != (self.path is not None):
            needs = "needs a path" if self.tier == "disk" else "takes no path"
            raise ValueError(f"tier {self.tier!r} {needs}")
        if len(set(self.prefetch)) < len(self.prefetch):
            raise ValueError(f"prefetch names something twice: {', '.join(self.prefetch)}")
        return self


class KvplugConfig(BaseModel):
    """Options of one engine. All lengths are in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: str = Field(DEFAULT_POLICY, description="recipe that chooses pages")
    budget: int = Field(2048, gt=0, description="far tokens attended per window and KV head")
    sink: int = Field(64, ge=0, description="first tokens, always attended; rounded up to pages")
    local: int = Field(512, gt=0, description="last tokens, always attended; rounded up to pages")
    window: int = Field(256, gt=0, description="query tokens that share one selection")
    dense_below: int = Field(4096, ge=0, description="contexts up to this length stay dense")
    dense_layers: Literal["auto"] | list[int] = Field(
        "auto", description="layers that stay dense: auto, or a list of layer numbers"
    )
    positions: Literal["orig", "fixed"] = Field(
        "orig", description="where attended keys stand: orig, or fixed at local tokens at most"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the hash planes")
    options: dict[str, Any] = Field(default_factory=dict, description="the recipe's own options")
    offload: OffloadConfig | None = Field(
        None, description="tier below the device, and the pool in front of it"
    )
    audit: float = Field(
        0.0, ge=0.0, le=1.0, description="fraction of windows that exact attention is computed for"
    )
    trace: str | None = Field(
        None, min_length=1, description="file that takes a trace of every request, prompts included"
    )

    @classmethod
    def parse(cls, raw: object) -> KvplugConfig:
        """Checks what the user wrote.

        Args:
            raw: The value of ``additional_config["kvplug"]``: a mapping of field names.

        Raises:
            KvplugError: The first thing that is wrong with it, in one sentence.
        """
        if not isinstance(raw, Mapping):
            raise KvplugError(f"kvplug's options must be a JSON object, not {raw!r}.")
        for name in raw:
            if name not in cls.model_fields:
                known = nearest_name(str(name), cls.model_fields)
                raise KvplugError(f"Unknown kvplug option {name!r}: {known}.")
        try:
            return cls.model_validate(dict(raw))
        except ValidationError as error:
            raise KvplugError(_first_problem(error, raw)) from None

    def check_page(self, page: int) -> None:
        """Checks what depends on the page size.

        Args:
            page: Tokens per page (vLLM's kernel block).

        Raises:
            KvplugError: ``window`` or ``budget`` does not fit the page.
        """
        if self.window % page:
            raise KvplugError(
                f"kvplug option window={self.window} must be a multiple of the page size {page}."
            )
        if self.budget < page:
            raise KvplugError(
                f"kvplug option budget={self.budget} must be at least one page of {page} tokens."
            )

    def resolve_dense_layers(self, num_layers: int) -> frozenset[int]:
        """The layers that never go through retrieval, in a model of ``num_layers`` layers.

        Raises:
            KvplugError: A listed layer does not exist.
        """
        if self.dense_layers == "auto" and self.positions == "fixed":
            return frozenset()  # a dense layer would meet distances that are not fixed
        if self.dense_layers == "auto":
            return frozenset(range(2) if num_layers >= DENSE_LAYERS_FROM else ())
        for layer in self.dense_layers:
            if not 0 <= layer < num_layers:
                raise KvplugError(
                    f"kvplug option dense_layers names layer {layer}, but the model's layers are "
                    f"0 to {num_layers - 1}."
                )
        return frozenset(self.dense_layers)


def _first_problem(error: ValidationError, raw: Mapping[str, object]) -> str:
    """One sentence for pydantic's first complaint."""
    problem = error.errors()[0]
    name = str(problem["loc"][0])
    field = KvplugConfig.model_fields[name]
    if name == "offload":
        return _offload_problem(problem)
    if name == "dense_layers":
        return (
            f"kvplug option dense_layers={raw[name]!r} must be 'auto' or a list of layer numbers."
        )
    return f"kvplug option {name}={raw[name]!r} ({field.description}): {clause(problem['msg'])}."


def _offload_problem(problem: Mapping[str, Any]) -> str:
    """One sentence for pydantic's complaint about ``offload``."""
    inner = [str(part) for part in problem["loc"][1:]]
    if problem["type"] == "model_type":
        return "kvplug option offload must be a JSON object."
    if not inner:
        said = problem["msg"].removeprefix("Value error, ")
        return f"kvplug option offload: {clause(said)}."
    name = inner[0]
    if name not in OffloadConfig.model_fields:
        known = nearest_name(name, OffloadConfig.model_fields)
        return f"Unknown kvplug option offload.{name}: {known}."
    description = OffloadConfig.model_fields[name].description
    return f"kvplug option offload.{name} ({description}): {clause(problem['msg'])}."


def json_object(text: str, flag: str) -> dict[str, Any]:
    """The JSON object that a command-line flag was given.

    Raises:
        KvplugError: ``text`` is something else.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise KvplugError(f"{flag} must be a JSON object, not {text!r}.")
    return value
