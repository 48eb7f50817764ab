"""What a request may ask for itself: read from its extra arguments, refused with one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError
from kvplug.knobs import Knobs

OFFLOAD = {"tier": "host", "hot_gib": 1.0, "cold_gib": 4.0}


def within(extra: dict[str, Any], **options: Any) -> Knobs | None:
    knobs = Knobs.parse(extra)
    assert knobs is not None
    return knobs.within(KvplugConfig.parse({"budget": 512, **options}), 32, 8192)


@pytest.mark.parametrize("extra", [None, {}, {"other": 3, "kvplug": 1}])
def test_other_extensions_are_left_alone(extra: dict[str, Any] | None) -> None:
    assert Knobs.parse(extra) is None


def test_what_is_asked_for() -> None:
    assert Knobs.parse({"kvplug_budget": 64, "x": "y"}) == Knobs(budget=64)
    assert Knobs.parse({"kvplug_dense": 1}) == Knobs(dense=True)
    assert Knobs.parse({"kvplug_usage": 1}) == Knobs(usage=True)


@pytest.mark.parametrize(
    ("extra", "options", "sentence"),
    [
        ({"kvplug_budget": 0}, {}, r"kvplug_budget=0 \(far tokens .*greater than 0"),
        ({"kvplug_budget": 1.5}, {}, "valid integer"),
        ({"kvplug_budget": [64]}, {}, "valid integer"),
        ({"kvplug_dense": "perhaps"}, {}, "kvplug_dense='perhaps'"),
        ({"kvplug_usage": "perhaps"}, {}, r"kvplug_usage='perhaps' \(say in usage"),
        ({"kvplug_usages": 1}, {}, "did you mean 'kvplug_usage'"),
        ({"kvplug_bugdet": 64}, {}, "did you mean 'kvplug_budget'"),
        ({"kvplug_budget": 31}, {}, "at least one page of 32 tokens"),
        ({"kvplug_budget": 8193}, {}, "at most 8192, the longest context"),
        ({"kvplug_budget": 64, "kvplug_dense": True}, {}, "exclude each other"),
        ({"kvplug_budget": 544}, {"offload": OFFLOAD}, "at most 512, the engine's budget"),
        ({"kvplug_dense": True}, {"offload": OFFLOAD}, "not served with offload"),
        ({"kvplug_budget": 64}, {"policy": "streaming"}, "'streaming' takes no kvplug_budget"),
        ({"kvplug_budget": 64}, {"policy": "dense"}, "'dense' takes no kvplug_budget"),
        ({"kvplug_recall_target": 0.9}, {}, "needs an engine with budget 'recall', not 'fixed'"),
        ({"kvplug_recall_target": 0}, {}, "greater than 0"),
        ({"kvplug_recall_target": 1.1}, {}, "less than or equal to 1"),
        ({"kvplug_recall_target": 0.9, "kvplug_dense": 1}, {}, "exclude each other"),
    ],
)
def test_nonsense_is_refused(extra: dict[str, Any], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(KvplugError, match=sentence):
        within(extra, **options)


def test_what_changes_nothing_is_dropped() -> None:
    """Such a request shares its prefix with all others."""
    assert within({"kvplug_budget": 512}) is None
    assert within({"kvplug_dense": 0}) is None
    assert within({"kvplug_dense": 1}, policy="dense") is None
    assert within({"kvplug_usage": 1}) is None
    assert within({"kvplug_budget": 256}) == Knobs(budget=256)
    assert within({"kvplug_budget": 256, "kvplug_usage": 1}) == Knobs(budget=256)
    recall = {"options": {"budget": {"name": "recall", "target": 0.9}}}
    assert within({"kvplug_recall_target": 0.9, "kvplug_budget": 512}, **recall) is None
    asked = within({"kvplug_recall_target": 0.8, "kvplug_budget": 512}, **recall)
    assert asked == Knobs(recall_target=0.8)


def test_salts_differ_by_wish_and_by_the_request_s_own() -> None:
    wishes = [Knobs(budget=64), Knobs(recall_target=0.9), Knobs(dense=True)]
    salts = {wish.salt(own) for wish in wishes for own in (None, "a", "b")}
    assert len(salts) == 9
    assert Knobs(budget=64).salt("a") == Knobs(budget=64).salt("a")


@pytest.mark.parametrize("wish", [{"dense": 1}, {"budget": 64}])
def test_counts_change_no_salt(wish: dict[str, int]) -> None:
    """Who wants to know shares prefixes with those who do not."""
    asked = {f"kvplug_{name}": value for name, value in wish.items()}
    plain, curious = within(asked), within({**asked, "kvplug_usage": 1})
    assert plain is not None
    assert curious is not None
    assert plain.salt("a") == curious.salt("a")
