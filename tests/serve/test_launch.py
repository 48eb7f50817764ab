"""`kvplug serve` is `vllm serve` with two flags filled in, and hands on kvplug's own refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, field_validator

from kvplug.errors import KvplugError
from kvplug.serve.launch import find_refusal, run_vllm, vllm_arguments


def additional(arguments: list[str]) -> Any:
    """The value of the one --additional-config."""
    assert arguments.count("--additional-config") == 1
    return json.loads(arguments[arguments.index("--additional-config") + 1])


def test_two_flags_are_filled_in() -> None:
    assert vllm_arguments("some/model", {"budget": 512, "options": {"last": 2}}, []) == [
        "serve", "some/model", "--attention-backend", "CUSTOM", "--additional-config",
        '{"kvplug": {"budget": 512, "options": {"last": 2}}}',
    ]  # fmt: skip


def test_without_options_kvplug_is_still_named() -> None:
    """So that a process without the backend refuses instead of serving without retrieval."""
    assert additional(vllm_arguments("m", {}, [])) == {"kvplug": {}}


def test_other_flags_pass_in_order() -> None:
    extra = ["--port", "9", "--block-size=64", "-tp", "2", "--no-enable-prefix-caching", "x y"]
    arguments = vllm_arguments("m", {}, extra)
    assert arguments[-len(extra) :] == extra


@pytest.mark.parametrize("flag", ["--additional-config", "--additional_config"])
@pytest.mark.parametrize("joined", [True, False], ids=["=", "apart"])
def test_additional_config_is_merged(flag: str, joined: bool) -> None:
    value = '{"other": {"a": 1}, "n": 2}'
    extra = [f"{flag}={value}"] if joined else [flag, value]
    arguments = vllm_arguments("m", {"seed": 3}, ["--port", "9", *extra, "--uvloop"])
    assert additional(arguments) == {"other": {"a": 1}, "n": 2, "kvplug": {"seed": 3}}
    assert arguments[-3:] == ["--port", "9", "--uvloop"]


@pytest.mark.parametrize("value", ["", "[1]", "{", "3", "null", "'{}'"])
def test_a_bad_additional_config_is_refused(value: str) -> None:
    with pytest.raises(KvplugError, match="--additional-config must be a JSON object"):
        vllm_arguments("m", {}, ["--additional-config", value])
    with pytest.raises(KvplugError, match="--additional-config must be a JSON object"):
        vllm_arguments("m", {}, ["--additional-config"])


@pytest.mark.parametrize(
    "extra",
    [
        ["--attention-backend", "CUSTOM"],
        ["--attention-backend=CPU_ATTN"],
        ["--attention_backend=X"],
    ],
    ids=str,
)
def test_the_backend_is_not_the_users_to_set(extra: list[str]) -> None:
    with pytest.raises(KvplugError, match="sets --attention-backend itself; leave it out"):
        vllm_arguments("m", {}, extra)


def test_options_come_as_flags() -> None:
    with pytest.raises(KvplugError, match="as flags of kvplug serve"):
        vllm_arguments("m", {}, ["--additional-config", '{"kvplug": {"seed": 1}}'])


@pytest.mark.parametrize(
    ("options", "words"),
    [({"bugdet": 1}, "did you mean 'budget'"), ({"window": 0}, "greater than 0")],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(KvplugError, match=words):
        vllm_arguments("m", options, [])


REFUSAL = KvplugError("Made up.")


def wrapped_by_pydantic() -> Exception:
    """As VllmConfig wraps what its validators raise."""

    class Config(BaseModel):
        x: int

        @field_validator("x")
        @classmethod
        def check(cls, value: int) -> int:
            raise REFUSAL

    try:
        Config(x=1)
    except Exception as error:
        return error
    raise AssertionError


def caused() -> Exception:
    error = RuntimeError("Engine core failed")
    error.__cause__ = ValueError("x")
    error.__cause__.__context__ = REFUSAL
    return error


@pytest.mark.parametrize("error", [REFUSAL, wrapped_by_pydantic(), caused()], ids=repr)
def test_a_refusal_is_found(error: Exception) -> None:
    assert find_refusal(error) is REFUSAL


def test_no_refusal_is_made_up() -> None:
    """Nor does a circle of causes go on for ever."""
    error = ValueError("theirs")
    error.__cause__ = RuntimeError("also theirs")
    error.__cause__.__cause__ = error
    assert find_refusal(error) is None
    assert find_refusal(None) is None


def fake_vllm(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[Any]:
    """vLLM's `serve`, replaced by one that notes its arguments and raises."""
    from vllm.entrypoints.cli import serve

    seen: list[Any] = []

    class Command:
        name = "serve"

        def subparser_init(self, subparsers: Any) -> None:
            parser = subparsers.add_parser("serve")
            parser.add_argument("model_tag")
            parser.add_argument("--port", type=int)

        def validate(self, parsed: Any) -> None:
            seen.append("validated")

        def cmd(self, parsed: Any) -> None:
            seen.append((parsed.model_tag, parsed.port, list(sys.argv)))
            if error:
                raise error

    monkeypatch.setattr(serve, "cmd_init", lambda: [Command()])
    monkeypatch.setattr("vllm.entrypoints.serve.utils.api_utils.cli_env_setup", lambda: None)
    monkeypatch.setattr("vllm.logger.configure_logging_from_args", lambda parsed: None)
    monkeypatch.setattr(sys, "argv", ["kvplug"])
    return seen


def test_vllm_runs_with_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_vllm(monkeypatch, None)
    run_vllm(["serve", "m", "--port", "9"])
    assert seen == ["validated", ("m", 9, ["vllm", "serve", "m", "--port", "9"])]


def test_a_refusal_comes_out_bare(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm(monkeypatch, wrapped_by_pydantic())
    with pytest.raises(KvplugError) as caught:
        run_vllm(["serve", "m"])
    assert caught.value is REFUSAL
    assert caught.value.__suppress_context__


def test_other_errors_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("no such model")
    fake_vllm(monkeypatch, error)
    with pytest.raises(RuntimeError) as caught:
        run_vllm(["serve", "m"])
    assert caught.value is error


def test_starting_stock_vllm_imports_no_numba() -> None:
    """Without the plugin's patches, vLLM's CPU worker dies in a process that has numba."""
    code = "import sys, kvplug.serve.launch; print('numba' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
