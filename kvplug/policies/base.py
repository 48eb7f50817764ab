"""What a recipe is: one implementation named for each stage of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from kvplug.budget.base import Budget
from kvplug.budget.fixed import FixedBudget
from kvplug.errors import KvplugError
from kvplug.index.base import Index
from kvplug.probe.base import Probe
from kvplug.probe.union import UnionProbe
from kvplug.segment.base import Segment
from kvplug.select.base import Select
from kvplug.select.top_pages import TopPages
from kvplug.stage import Stage

FEATURES = {
    "logits": "scores on the scale of attention logits",
    "events": "a segment stage",
    "chunks": "an index of chunks",
    "means": "an index of page means",
    "best first": "a selector that takes pages in the order of their scores",
}
"""What stages may need of each other, in words."""


@dataclass(frozen=True)
class Stages:
    """The stages of one recipe; ``None`` where it has no use for a stage.

    Raises:
        KvplugError: Two stages do not go together.
    """

    index: Index | None
    probe: Probe | None
    budget: Budget = FixedBudget()
    select: Select = TopPages()
    segment: Segment | None = None
    merge: str = "exact"
    """How outputs over pages are merged: ``exact``, by one softmax over everything attended, or
    ``coarse``, by the softmax of page summaries (HCAM)."""
    attend: str | None = None
    """What attends to selected pages, where the platform leaves a choice: ``triton``, kvplug's own
    kernel, ``flash``, vLLM's FlashAttention, or ``xformers``. None: the platform's first."""
    graphs: bool = False
    """Whether steps of decoded tokens may be captured in CUDA graphs."""
    always_dense: bool = False
    """Attend to everything, by the platform's own path."""

    def __post_init__(self) -> None:
        """Checks that every stage finds what it needs."""
        if (self.index is None) != (self.probe is None):
            raise KvplugError("A recipe needs an index and a probe, or neither.")
        for stage in self.all():
            for feature, purpose in stage.needs.items():
                if not self.gives(feature):
                    raise KvplugError(
                        f"{stage.kind.capitalize()} {stage.name!r} needs {FEATURES[feature]} "
                        f"{purpose}, which none of the recipe's other stages gives."
                    )
        if self.segment and not any("events" in stage.needs for stage in self.all()):
            raise KvplugError(
                f"Segment {self.segment.name!r} is of no use: none of the recipe's other stages "
                f"needs events."
            )
        if self.merge == "coarse" and not self.gives("means"):
            index = f"index {self.index.name!r}" if self.index else "a recipe without an index"
            raise KvplugError(
                f"Merge 'coarse' needs {FEATURES['means']} to weigh pages by, which {index} does "
                f"not give: choose index 'chunk_mean', or merge 'exact'."
            )

    def gives(self, feature: str) -> bool:
        """Whether any stage gives a feature of FEATURES."""
        return any(feature in stage.gives for stage in self.all())

    def all(self) -> list[Stage]:
        """The stages that there are, those that a union joins included."""
        joined = self.probe.probes if isinstance(self.probe, UnionProbe) else ()
        stages = (self.segment, self.index, self.probe, *joined, self.budget, self.select)
        return [stage for stage in stages if stage is not None]

    def hit_margin(self, local: int, window: int) -> int:
        """Tokens, in whole windows, behind a page that decide what is stored for it.

        Where a page is finished only once the local region has passed it, queries of every window
        count that begins no further behind it than that, to the window's end. So requests share
        pages up to this much before their texts part.

        Args:
            local: Tokens of the local region.
            window: Tokens of a window.
        """
        if not any(stage.lookahead for stage in self.all()):
            return 0
        return (-(-local // window) + 1) * window


@dataclass(frozen=True)
class Policy:
    """A recipe. Subclasses are frozen dataclasses whose fields are the user's ``options``.

    Raises (from ``__post_init__`` of subclasses):
        KvplugError: An option is out of range.
    """

    def stages(self) -> Stages:
        """The recipe's stages, built from its options."""
        raise NotImplementedError
