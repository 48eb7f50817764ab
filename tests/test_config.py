"""Options: the defaults of the public interface, and one clear sentence for each bad one."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvplug.config import KvplugConfig
from kvplug.errors import KvplugError
from kvplug.pages import PageGeometry
from kvplug.policies import make_stages

# The table of the public interface.
DEFAULTS = {
    "policy": "channels",
    "budget": 2048,
    "sink": 64,
    "local": 512,
    "window": 256,
    "dense_below": 4096,
    "dense_layers": "auto",
    "positions": "orig",
    "seed": 0,
    "options": {},
    "offload": None,
    "audit": 0.0,
    "trace": None,
}


def refusal(raw: object) -> str:
    """What the user reads: one sentence on one line."""
    with pytest.raises(KvplugError) as caught:
        KvplugConfig.parse(raw)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert caught.value.__cause__ is None
    return message


def test_defaults() -> None:
    assert KvplugConfig.parse({}).model_dump() == DEFAULTS


def test_every_field_is_described() -> None:
    assert all(field.description for field in KvplugConfig.model_fields.values())


@pytest.mark.parametrize("raw", [None, [], "simhash", 3, True], ids=repr)
def test_options_are_an_object(raw: object) -> None:
    assert "JSON object" in refusal(raw)


@pytest.mark.parametrize(
    ("written", "nearest"),
    [("polcy", "policy"), ("bugdet", "budget"), ("sinks", "sink"), ("windows", "window"),
     ("dense-below", "dense_below"), ("denselayers", "dense_layers"), ("Seed", "seed"),
     ("option", "options"), ("off_load", "offload")],
)  # fmt: skip
def test_an_unknown_field_gets_the_nearest_name(written: str, nearest: str) -> None:
    message = refusal({written: 1})
    assert repr(written) in message
    assert f"did you mean {nearest!r}?" in message
    assert all(name in message for name in DEFAULTS)


def test_a_name_like_no_other_gets_all_names() -> None:
    message = refusal({"zzz": 1})
    assert "did you mean" not in message
    assert all(name in message for name in DEFAULTS)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("policy", 3, "string"),
        ("budget", 0, "greater than 0"),
        ("budget", -5, "greater than 0"),
        ("budget", "512", "integer"),
        ("budget", 1.5, "integer"),
        ("budget", True, "integer"),
        ("budget", None, "integer"),
        ("sink", -1, "greater than or equal to 0"),
        ("local", 0, "greater than 0"),
        ("window", 0, "greater than 0"),
        ("dense_below", -1, "greater than or equal to 0"),
        ("positions", "fix", "'orig' or 'fixed'"),
        ("positions", True, "'orig' or 'fixed'"),
        ("dense_layers", "all", "auto"),
        ("dense_layers", 2, "auto"),
        ("dense_layers", [0.5], ""),
        ("dense_layers", ["0"], ""),
        ("seed", -1, "greater than or equal to 0"),
        ("options", [], "dict"),
        ("options", None, "dict"),
        ("audit", 1.1, "less than or equal to 1"),
        ("audit", -0.1, "greater than or equal to 0"),
        ("trace", "", "at least 1 character"),
        ("trace", 3, "valid string"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(field: str, value: Any, limit: str) -> None:
    message = refusal({"policy": "quest", field: value})
    assert f"kvplug option {field}" in message
    assert limit in message
    assert re.search(r"not available|" + re.escape(repr(value)), message)


@pytest.mark.parametrize(
    ("offload", "words"),
    [
        (7, "must be a JSON object"),
        ({}, "offload.tier"),
        ({"tier": "tape"}, "'host' or 'disk'"),
        ({"tier": "disk"}, "needs a path"),
        ({"tier": "host", "path": "x"}, "takes no path"),
        ({"tier": "host", "hot_gib": 0}, "offload.hot_gib (GiB"),
        ({"tier": "host", "cold_gib": -1}, "greater than 0"),
        ({"tier": "host", "eviction": "fifo"}, "offload.eviction (which hot page gives way"),
        ({"tier": "host", "prefetch": ["next"]}, "'last', 'events' or 'next_layer'"),
        ({"tier": "host", "prefetch": "last"}, "offload.prefetch (pages read ahead of need"),
        ({"tier": "host", "prefetch": ["last", "last"]}, "names something twice"),
        ({"tier": "host", "hot": 1}, "did you mean 'hot_gib'?"),
    ],
)
def test_a_bad_tier_is_named(offload: Any, words: str) -> None:
    message = refusal({"policy": "quest", "offload": offload})
    assert "kvplug option offload" in message
    assert words in message


@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_pages_that_fit(page: int) -> None:
    KvplugConfig.parse({"window": 128, "budget": 128}).check_page(page)


@pytest.mark.parametrize(
    ("options", "page", "words"),
    [
        ({"window": 48}, 32, "window=48 must be a multiple of the page size 32"),
        ({"window": 16}, 32, "window=16 must be a multiple of the page size 32"),
        ({"budget": 31}, 32, "budget=31 must be at least one page of 32 tokens"),
        ({"budget": 32}, 64, "budget=32 must be at least one page of 64 tokens"),
    ],
)
def test_pages_that_do_not_fit(options: dict[str, Any], page: int, words: str) -> None:
    with pytest.raises(KvplugError, match=words):
        KvplugConfig.parse(options).check_page(page)


@pytest.mark.parametrize(
    ("chosen", "layers", "dense"),
    [
        ("auto", 1, set()),
        ("auto", 7, set()),
        ("auto", 8, {0, 1}),
        ("auto", 80, {0, 1}),
        ([], 80, set()),
        ([0], 1, {0}),
        ([5, 0, 5], 6, {0, 5}),
    ],
)
def test_dense_layers(chosen: Any, layers: int, dense: set[int]) -> None:
    config = KvplugConfig.parse({"dense_layers": chosen})
    assert config.resolve_dense_layers(layers) == dense


@pytest.mark.parametrize("layer", [-1, 6, 100])
def test_a_dense_layer_that_is_not_there(layer: int) -> None:
    config = KvplugConfig.parse({"dense_layers": [0, layer]})
    with pytest.raises(KvplugError, match=f"names layer {layer}, .* layers are 0 to 5"):
        config.resolve_dense_layers(6)


@pytest.mark.parametrize(
    ("sink", "page", "pages"), [(0, 32, 0), (1, 32, 1), (32, 32, 1), (33, 32, 2)]
)
def test_sinks_are_rounded_up_and_budgets_down(sink: int, page: int, pages: int) -> None:
    config = KvplugConfig.parse({"sink": sink})
    geometry = PageGeometry.of(config, page, 2)
    assert (geometry.sink_pages, geometry.budget_pages) == (pages, 2)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("simhsh", {}, r"Unknown policy 'simhsh': did you mean 'simhash'\? valid names: actqkv, "),
        ("QUEST", {}, "Unknown policy 'QUEST': .*quest"),
        ("", {}, "valid names"),
        ("simhash", {"lst": 2}, "option 'lst' of policy 'simhash': did you mean 'last'"),
        ("simhash", {"last": "2"}, "'last' of policy 'simhash' must be a whole number, not '2'"),
        ("simhash", {"last": True}, "must be a whole number, not True"),
        ("simhash", {"last": 0}, "last >= 1"),
        ("simhash", {"active": -1}, "active >= 0"),
        (
            "quest",
            {"last": 2},
            "Option 'last' belongs to policy .*'simhash', not to 'quest'",
        ),
    ],
)
def test_bad_policies(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(KvplugError, match=words) as caught:
        make_stages(name, options)
    assert str(caught.value).endswith(".")
