"""What one benchmark process is asked to do, and what it answers; both travel as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

STOCK = "dense"
"""Stock vLLM with no plugin loaded: the baseline of every ratio."""
UNSELECTED = "unselected"
"""vLLM with kvplug installed but not selected."""


@dataclass(frozen=True)
class Job:
    """One engine and the cells measured on it."""

    policy: str
    """A recipe, or STOCK, or UNSELECTED."""
    model: str
    """``recall``, ``random``, or a path."""
    contexts: list[int]
    """Prompt lengths in tokens."""
    batches: list[int]
    """Requests at once."""
    repeats: int
    """Times every cell is measured; medians are reported."""
    page: int
    """vLLM's block size, for every policy."""
    chunk: int
    """vLLM's limit of prompt tokens per step, for every policy."""
    decoded: int
    """Tokens decoded per request."""
    eager: bool
    """Run vLLM without its compiler: starts sooner, decodes slower."""
    needles: int
    """Questions asked about one document of the longest context; 0 for none."""
    options: dict[str, Any] = field(default_factory=dict)
    """kvplug's options besides the policy."""
    document: str = "needle"
    """What the recall model is asked: a ``needle``, or a ``chain`` of words that stand apart."""
    kv_gib: int | None = None
    """GiB of vLLM's cache; None: as many as the largest cell needs."""

    def to_json(self) -> str:
        """The job as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that :meth:`to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Cell:
    """One measured cell: medians over the repeats."""

    context_tokens: int
    batch: int
    ttft_s: float
    """Median over requests of the time from submission to first token, seconds."""
    decode_tok_s: float
    """Tokens per second of the whole batch, once every request of it decodes."""
    total_s: float
    """Time from submission to the last token of the last request, seconds."""
    correct: bool | None
    """Whether every answer was right; None where the model cannot answer."""
    tokens: list[list[int]]
    """Decoded token ids of the first repeat, one list per request."""
