"""Recipes put together from stages by name: what fits works, and nonsense is refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from kvplug.budget.entropy import EntropyBudget
from kvplug.budget.top_p import TopPBudget
from kvplug.errors import KvplugError
from kvplug.fields import build
from kvplug.index.chunk_mean import ChunkMean
from kvplug.index.minmax import MinMax
from kvplug.index.simhash import SimHash
from kvplug.policies import POLICIES, check, make_stages
from kvplug.policies.base import Policy, Stages
from kvplug.policies.stages import REGISTRIES, REPLACEABLE
from kvplug.probe.last_activated import LastAndActivatedProbe
from kvplug.probe.mean import MeanProbe
from kvplug.probe.union import UnionProbe
from kvplug.segment.uniform import Uniform
from kvplug.select.events import Events
from kvplug.select.top_pages import TopPages
from kvplug.stage import Stage
from tests.cases import PolicyCase
from tests.made_up import Piece, World

RETRIEVING = [name for name in POLICIES if make_stages(name, {}).index is not None]
PLAIN = [name for name in POLICIES if name not in RETRIEVING]


def refusal(policy: str, options: dict[str, Any]) -> str:
    """What the user reads at start-up: one sentence on one line."""
    with pytest.raises(KvplugError) as caught:
        check({"policy": policy, "options": options})
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert message[0].isupper() or message.startswith(("top_p", "chunk_mean", "probe"))
    return message


def test_stages_by_name_and_by_object() -> None:
    stages = make_stages(
        "simhash",
        {
            "index": {"name": "chunk_mean", "pages": 4, "spread": 2},
            "probe": "mean",
            "budget": {"name": "top_p", "p": 0.5},
            "segment": {"name": "uniform", "max_tokens": 64},
            "select": "events",
            "merge": "coarse",
        },
    )
    assert stages == Stages(
        index=ChunkMean(pages=4, spread=2.0), probe=MeanProbe(), budget=TopPBudget(p=0.5),
        segment=Uniform(max_tokens=64), select=Events(), merge="coarse",
    )  # fmt: skip


def test_what_is_not_replaced_stays() -> None:
    stages = make_stages("simhash", {"budget": "entropy", "last": 2, "active": 3})
    expected = Stages(SimHash(), LastAndActivatedProbe(last=2, active=3), EntropyBudget())
    assert stages == expected


def test_a_list_of_probes_is_a_union() -> None:
    stages = make_stages("quest", {"probe": ["mean", {"name": "last_activated", "last": 1}]})
    assert stages.probe == UnionProbe((MeanProbe(), LastAndActivatedProbe(last=1)))


def test_a_segment_can_be_left_out() -> None:
    stages = make_stages("quest", {"segment": None, "select": "top"})
    assert stages == make_stages("quest", {})


@pytest.mark.parametrize("policy", RETRIEVING)
@pytest.mark.parametrize("kind", REGISTRIES)
def test_any_stage_fits_any_recipe_or_is_refused(policy: str, kind: str) -> None:
    """Never another error than a refusal, and what is not refused is what was asked for."""
    for name in REGISTRIES[kind]:
        told = ""
        try:
            stages = make_stages(policy, {kind: name})
        except KvplugError as error:
            told = str(error)
        if told:
            assert repr(name) in told or "events" in told or "logits" in told
        else:
            assert getattr(stages, kind).name == name


@pytest.mark.parametrize(
    "options",
    [
        {"index": "minmax", "budget": "top_p"},
        {"probe": ["mean", "last_activated", "activation"], "budget": "entropy"},
        {"index": "chunk_mean", "segment": "uniform", "select": "events"},
    ],
    ids=str,
)
def test_combinations_run(options: dict[str, Any]) -> None:
    small = {"sink": 10, "local": 20, "budget": 46, "window": 16, "dense_below": 100}
    made = World(PolicyCase("simhash", options), small)
    attended = made.run([Piece(1, 256, 64, True), Piece(2, 480, 1, False)])
    assert all(found is not None for found in attended.values())


@pytest.mark.parametrize("kind", REGISTRIES)
@pytest.mark.parametrize("name", ["nonsense", "", "union ", "None"])
def test_unknown_stages(kind: str, name: str) -> None:
    message = refusal("quest", {kind: name})
    assert message.startswith(f"Unknown {kind} {name!r}: ")
    assert "valid names: " in message


def test_the_nearest_stage_is_named() -> None:
    assert "did you mean 'minmax'?" in refusal("simhash", {"index": "min_max"})
    assert "did you mean 'coarse'?" in refusal("hcam", {"merge": "course"})


@pytest.mark.parametrize("kind", REGISTRIES)
@pytest.mark.parametrize(
    "value", [3, True, 0.5, {}, {"nam": "mean"}, {"name": 3}, {"name": ["mean"]}], ids=repr
)
def test_stages_of_a_wrong_type(kind: str, value: Any) -> None:
    message = refusal("quest", {kind: value})
    assert message.startswith(f"Option {kind!r} must be the name of a stage, or an object like")
    assert message.endswith(f"not {value!r}.")


@pytest.mark.parametrize("kind", [kind for kind in REGISTRIES if kind != "segment"])
def test_only_a_segment_can_be_left_out(kind: str) -> None:
    assert f"Option {kind!r} must be" in refusal("quest", {kind: None})


def test_lists_are_for_probes() -> None:
    assert "Option 'index' must be" in refusal("quest", {"index": ["minmax"]})
    assert "must name at least one" in refusal("quest", {"probe": []})
    assert "not ['mean']" in refusal("quest", {"probe": [["mean"]]})
    assert "Unknown probe 'meen'" in refusal("quest", {"probe": ["mean", "meen"]})


@pytest.mark.parametrize("value", ["", "Exact", None, 1, ["exact"], {"name": "exact"}], ids=repr)
def test_unknown_merges(value: Any) -> None:
    assert f"Unknown merge {value!r}: " in refusal("hcam", {"merge": value})


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("pages", "3", "a whole number"),
        ("pages", 3.0, "a whole number"),
        ("pages", True, "a whole number"),
        ("pages", None, "a whole number"),
        ("spread", "4", "a number"),
        ("spread", [4.0], "a number"),
        ("spread", False, "a number"),
        ("spread", 10**400, "a number"),
        ("spread", math.nan, "finite"),
        ("spread", math.inf, "finite"),
        ("pages", 2**31, "below 2147483648"),
        ("pages", -(2**31), "below 2147483648"),
        ("heads", 1, "a string"),
    ],
)
def test_fields_of_a_wrong_type(field: str, value: Any, wanted: str) -> None:
    """In a recipe and in a stage alike."""
    in_recipe = refusal("hcam", {field: value})
    assert in_recipe == f"Option {field!r} of policy 'hcam' must be {wanted}, not {value!r}."
    in_stage = refusal("quest", {"index": {"name": "chunk_mean", field: value}})
    assert in_stage == f"Option {field!r} of index 'chunk_mean' must be {wanted}, not {value!r}."


def test_unknown_fields() -> None:
    message = refusal("quest", {"index": {"name": "chunk_mean", "page": 8}})
    assert message.startswith("Unknown option 'page' of index 'chunk_mean': did you mean 'pages'?")
    message = refusal("quest", {"index": {"name": "minmax", "pages": 8}})
    assert message == "Unknown option 'pages' of index 'minmax': it has none."
    message = refusal("simhash", {"lasst": 3})
    assert message.startswith("Unknown option 'lasst' of policy 'simhash': did you mean 'last'?")


def test_a_misspelt_stage_kind_is_told() -> None:
    """Also by a recipe that has no fields of its own."""
    assert "did you mean 'index'?" in refusal("quest", {"indx": "minmax"})
    for kind in REPLACEABLE:
        assert kind in refusal("quest", {"nonsense": 1})


def test_an_option_of_another_recipe() -> None:
    message = refusal("quest", {"spread": 2.0})
    assert message == "Option 'spread' belongs to policy 'hcam', not to 'quest'."
    for name in RETRIEVING:
        for other in POLICIES:
            theirs = set(POLICIES.get(name).__dataclass_fields__)
            foreign = sorted(theirs - set(POLICIES.get(other).__dataclass_fields__))
            if foreign:
                message = refusal(other, {foreign[0]: 1})
                assert repr(name) in message
                assert message.endswith(f"not to {other!r}.")


def test_events_need_a_segment() -> None:
    message = refusal("quest", {"select": "events"})
    assert message.startswith("Select 'events' needs a segment stage")
    message = refusal("emllm", {"segment": None})
    assert message.startswith("Select 'events' needs a segment stage")


def test_a_segment_needs_something_that_uses_events() -> None:
    """Surprise is costly, and would change nothing."""
    for options in ({"segment": "surprise"}, {"segment": "uniform", "select": "top"}):
        name = options["segment"]
        assert refusal("quest", options).startswith(f"Segment {name!r} is of no use")


@pytest.mark.parametrize("index", ["simhash", "buckets"])
def test_top_p_needs_logits(index: str) -> None:
    message = refusal("quest", {"index": index, "budget": "top_p"})
    assert message.startswith("Budget 'top_p' needs scores on the scale of attention logits")


@pytest.mark.parametrize("index", ["minmax", "simhash"])
def test_coarse_needs_means(index: str) -> None:
    message = refusal("hcam", {"index": index, "merge": "coarse"})
    assert f"index {index!r} does not give" in message
    assert "'chunk_mean'" in message
    with pytest.raises(KvplugError, match="a recipe without an index does not give"):
        Stages(None, None, merge="coarse")


@pytest.mark.parametrize("policy", PLAIN)
@pytest.mark.parametrize(
    "options",
    [{"index": "minmax"}, {"merge": "exact"}, {"probe": "mean", "select": "top"}],
    ids=str,
)
def test_recipes_that_retrieve_nothing_have_nothing_to_replace(
    policy: str, options: dict[str, Any]
) -> None:
    message = refusal(policy, options)
    assert message.startswith(f"Policy {policy!r} retrieves nothing, so ")
    assert all(repr(option) in message for option in options)


@pytest.mark.parametrize(
    ("policy", "options", "lost"),
    [
        ("hcam", {"pages": 3, "index": "minmax"}, "pages"),
        ("simhash", {"last": 2, "probe": "mean"}, "last"),
        ("simhash", {"last": 2, "probe": ["mean"], "index": "minmax"}, "last"),
    ],
)
def test_options_that_a_replacement_makes_useless(
    policy: str, options: dict[str, Any], lost: str
) -> None:
    message = refusal(policy, options)
    assert message.startswith(f"Option {lost!r} of policy {policy!r} has no effect")


def test_options_that_a_replacement_leaves_in_place() -> None:
    stages = make_stages("hcam", {"pages": 3, "probe": "last_activated"})
    assert stages.index == ChunkMean(pages=3)
    # A recipe's default says nothing, so it is not held against the user.
    assert make_stages("simhash", {"last": 4, "probe": "mean"}).probe == MeanProbe()


def test_an_index_and_a_probe_come_together() -> None:
    for parts in ((MinMax(), None), (None, MeanProbe())):
        with pytest.raises(KvplugError, match="needs an index and a probe, or neither"):
            Stages(*parts)


def test_parts_of_a_union_count() -> None:
    """What a probe needs, and that it looks ahead, holds among others too."""

    @dataclass(frozen=True)
    class Forward(MeanProbe):
        lookahead = True

    @dataclass(frozen=True)
    class Demanding(MeanProbe):
        name = "demanding"
        needs = {"events": "to probe them"}  # noqa: RUF012

    def joined(probe: MeanProbe) -> Stages:
        return Stages(MinMax(), UnionProbe((MeanProbe(), probe)))

    assert joined(MeanProbe()).hit_margin(20, 16) == 0
    assert joined(Forward()).hit_margin(20, 16) == 48
    with pytest.raises(KvplugError, match="Probe 'demanding' needs a segment stage to probe them"):
        joined(Demanding())


@pytest.mark.parametrize("kind", REGISTRIES)
def test_registries_file_stages_by_kind_and_name(kind: str) -> None:
    for name in REGISTRIES[kind]:
        stage = REGISTRIES[kind].get(name)
        assert issubclass(stage, Stage)
        assert (stage.kind, stage.name) == (kind, name)
        assert isinstance(build(stage, name, {}), stage), "defaults must do"


def test_select_top_is_the_default() -> None:
    assert make_stages("quest", {}).select == TopPages()


def test_a_recipe_that_gives_no_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Empty(Policy):
        def stages(self) -> Stages:
            return {"index": "minmax"}  # type: ignore[return-value]

    monkeypatch.setitem(POLICIES._entries, "empty", Empty)
    assert refusal("empty", {}) == "Policy 'empty' gives no kvplug Stages, but {'index': 'minmax'}."
