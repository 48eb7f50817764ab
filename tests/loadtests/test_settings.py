"""Settings are checked before anything starts, and traffic stays here unless it is sent away."""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.settings import check_url
from tests.loadtests.made_up import settings


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"loop": "opened"}, "did you mean 'open'"),
        ({"process": "poison"}, "did you mean 'poisson'"),
        ({"shape": "swep"}, "did you mean 'sweep'"),
        ({"workload": "needle"}, "did you mean 'needles'"),
        ({"lengths": "fix:3"}, "did you mean 'fixed'"),
        ({"short_lengths": "fixed:1"}, "between 128"),
        ({"levels": (1.5,)}, "whole numbers"),
        ({"levels": (1.0, 2.0)}, "takes 1 levels"),
        ({"requests": 0}, "--requests gives 0"),
        ({"requests": 10**6}, "--requests gives 1e"),
        ({"timeout_s": float("nan")}, "--timeout gives nan"),
        ({"processes": 65}, "--processes gives 65"),
        ({"short_share": 1.1}, "between 0 and 1"),
        ({"seconds": 1e6}, "--seconds gives"),
        ({"most_s": 0.0}, "--most-minutes gives 0"),
        ({"turns": 0}, "--turns gives 0"),
        ({"output_tokens": 0}, "--output-tokens gives 0"),
    ],
)
def test_nonsense_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(KvplugError, match=words):
        settings(**changed)


def test_the_longest_prompt() -> None:
    assert settings(lengths="uniform:200-900").longest == 900
    assert settings(workload="mixed", short_lengths="fixed:1000").longest == 1000
    assert settings(workload="needles", short_lengths="fixed:1000").longest == 300
    assert settings(workload="multi-turn", turns=3).longest > 300


def test_every_body_asks_for_counts_and_a_stream() -> None:
    body = settings().body("m")
    assert (body["model"], body["stream"], body["temperature"]) == ("m", True, 0)
    assert body["stream_options"] == {"include_usage": True}
    assert "ignore_eos" not in body
    assert settings(ignore_eos=True).body("m")["ignore_eos"] is True


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "http://localhost:8000/v1/", "http://[::1]:8000/v1"]
)
def test_this_machine_is_always_fine(url: str) -> None:
    assert check_url(url, is_given=False).endswith(":8000/v1")


def test_other_machines_must_be_named() -> None:
    with pytest.raises(KvplugError, match="only with --url"):
        check_url("http://example.org:8000/v1", is_given=False)
    assert check_url("https://example.org", is_given=True) == "https://example.org/v1"


@pytest.mark.parametrize("url", ["ftp://localhost", "localhost:8000", "", "http://"])
def test_other_things_are_no_urls(url: str) -> None:
    with pytest.raises(KvplugError, match="must be a URL"):
        check_url(url, is_given=True)
