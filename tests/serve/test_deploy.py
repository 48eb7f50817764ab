"""The deployment files name what exists: flags, options, services, dashboards."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import kvplug
from kvplug.config import KvplugConfig
from kvplug.policies import check

DEPLOY = Path(kvplug.__file__).parent / "serve" / "deploy"


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = read("compose.yaml")["services"]
    return found


def test_replicas_have_flags_that_are_taken(services: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    engine = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in ("replica-1", "replica-2"):
        _, *flags = services[name]["command"]
        split = [flag.removeprefix("--").split("=") for flag in flags]
        given = {key.replace("-", "_"): value for key, value in split}
        mine = {key: given.pop(key) for key in list(given) if key in KvplugConfig.model_fields}
        numbers = {"budget": int, "audit": float}
        check({key: numbers.get(key, str)(value) for key, value in mine.items()})
        assert set(given) <= engine | {"host", "port"}


def test_every_mounted_file_is_there(services: dict[str, Any]) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", [])]
    local = [mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert len(local) == 5
    for path in local:
        assert (DEPLOY / path).exists(), path
    assert list((DEPLOY / "../dashboards").glob("*.json"))
    assert (DEPLOY / services["replica-1"]["build"]["context"] / "pyproject.toml").exists()


def test_traffic_and_scrapes_reach_both_replicas(services: dict[str, Any]) -> None:
    [job] = read("prometheus.yaml")["scrape_configs"]
    [static] = job["static_configs"]
    replicas = {f"{name}:8000" for name in services if name.startswith("replica")}
    assert set(static["targets"]) == replicas
    nginx = (DEPLOY / "nginx.conf").read_text()
    assert all(f"server {replica};" in nginx for replica in replicas)
    assert read("grafana/sources.yaml")["datasources"][0]["url"] == "http://prometheus:9090"


def test_ray_s_engine_takes_its_arguments() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    [application] = read("ray_serve.yaml")["applications"]
    for config in application["args"]["llm_configs"]:
        kwargs = config["engine_kwargs"]
        assert set(kwargs) <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}
        assert kwargs["attention_backend"] == "CUSTOM"
        check(kwargs["additional_config"]["kvplug"])


def test_nobody_but_this_machine_is_served_unless_asked_for(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith(("127.0.0.1:", "${LISTEN:-127.0.0.1}:")) for port in ports)


def test_every_variable_is_explained() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    comment, _, body = text.partition("x-replica:")
    names = set(re.findall(r"\$\{(\w+)", body))
    assert "API_KEY" in names
    assert names <= set(re.findall(r"[A-Z]\w+", comment))
