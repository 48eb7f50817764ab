"""Metrics are summed over labels, buckets left out, and a server that is silent costs nothing."""

from __future__ import annotations

from collections.abc import Callable

from kvplug.loadtests.scrape import Sampler, values_of
from kvplug.serve.server import Server, free_port

TEXT = """\
# HELP vllm:kv_cache_usage_perc x
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:generation_tokens_total{engine="0"} 7.0
vllm:generation_tokens_total{engine="1"} 5.0
vllm:generation_tokens_created{engine="1"} 1.7e9
vllm:time_to_first_token_seconds_sum{engine="0"} 9.0
kvplug:pages_total 12
kvplug:seconds_bucket{le="1.0"} 3
kvplug:seconds_count 3
python_info{version="3"} 1
broken
"""


def test_values() -> None:
    assert values_of(TEXT) == {
        "vllm:kv_cache_usage_perc": 0.25, "vllm:generation_tokens_total": 12.0,
        "kvplug:pages_total": 12.0, "kvplug:seconds_count": 3.0,
    }  # fmt: skip


def test_a_running_server_is_looked_at_at_both_ends(fake: Callable[..., Server]) -> None:
    found: list[tuple[float, dict[str, float]]] = []
    with Sampler(fake().url, 0.0, lambda at, values: found.append((at, values))):
        assert len(found) == 1
    assert len(found) == 2
    assert found[0][0] < found[1][0]
    assert "vllm:kv_cache_usage_perc" in found[0][1]


def test_nobody_there() -> None:
    found: list[object] = []
    url = f"http://127.0.0.1:{free_port()}/v1"
    with Sampler(url, 0.01, lambda *look: found.append(look)):
        pass
    assert found == []
