"""The command line: flags become options, mistakes become one sentence and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from kvplug import cli
from kvplug.config import KvplugConfig
from kvplug.serve import launch


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `kvplug serve` would run vLLM with."""
    runs: list[list[str]] = []
    monkeypatch.setattr(launch, "run_vllm", lambda arguments: runs.append(list(arguments)))
    return runs


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `kvplug ARGUMENTS`, by the function that the command calls."""
    monkeypatch.setattr(sys, "argv", ["kvplug", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def options_in(arguments: list[str]) -> Any:
    return json.loads(arguments[arguments.index("--additional-config") + 1])["kvplug"]


def test_serve_passes_flags_on(served: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    code = run(
        monkeypatch, "serve", "some/model", "--budget", "512", "--policy", "simhash", "--port", "9",
        "--dense-below", "0", "--enforce-eager", "--dense-layers", "0,3", "--max-model-len=4096",
        "--options", '{"last": 2}', "--seed", "5", "--sink", "0", "--local", "64",
        "--window", "128", "--positions", "fixed", "--additional-config", '{"other": 1}',
    )  # fmt: skip
    assert code == 0
    [arguments] = served
    assert arguments[:4] == ["serve", "some/model", "--attention-backend", "CUSTOM"]
    assert options_in(arguments) == {
        "policy": "simhash", "budget": 512, "sink": 0, "local": 64, "window": 128, "dense_below": 0,
        "dense_layers": [0, 3], "positions": "fixed", "seed": 5, "options": {"last": 2},
    }  # fmt: skip
    assert arguments[-4:] == ["--port", "9", "--enforce-eager", "--max-model-len=4096"]
    assert '"other": 1' in arguments[5]


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--dense-layers", "auto"], {"dense_layers": "auto"}),
        (["--dense-layers", "7"], {"dense_layers": [7]}),
        (["--dense-layers", ""], {"dense_layers": []}),
    ],
    ids=str,
)
def test_only_what_is_given_is_passed(
    flags: list[str],
    options: dict[str, Any],
    served: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(monkeypatch, "serve", "m", *flags) == 0
    assert options_in(served[0]) == options


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(["serve", "m", "--policy", "simhsh"],
                     "Unknown policy 'simhsh': did you mean 'simhash'?", id="serve: policy"),
        pytest.param(["serve", "m", "--options", '{"lst": 1}'], "did you mean 'last'",
                     id="serve: policy option"),
        pytest.param(["serve", "m", "--budget", "0"], "budget=0", id="serve: budget"),
        pytest.param(["serve", "m", "--options", "[1]"],
                     "--options must be a JSON object, not '[1]'.", id="serve: options"),
        pytest.param(["serve", "m", "--dense-layers", "all"],
                     "--dense-layers 'all' must be auto or numbers like 0,1.", id="serve: layers"),
        pytest.param(["serve", "m", "--attention-backend", "X"], "leave it out", id="serve: flag"),
        pytest.param(["bench", "--contexts", "4k"], "'4k' must be positive whole numbers",
                     id="bench: contexts"),
        pytest.param(["bench", "--batches", "0"], "'0' must be positive", id="bench: batches"),
        pytest.param(["bench", "--options", "{"], "must be a JSON object", id="bench: options"),
        pytest.param(["bench", "--policies", "simhsh"],
                     "Unknown policy 'simhsh': did you mean 'simhash'?", id="bench: policy"),
        pytest.param(["bench", "--budget", "7"], "at least one page", id="bench: budget"),
        pytest.param(["bench", "policies", "--budget", "7"], "at least one page",
                     id="bench policies: budget"),
        pytest.param(["bench", "recipes", "--policies", "simhash,qest"],
                     "Unknown policy 'qest': did you mean 'quest'?", id="bench recipes: policy"),
        pytest.param(["bench", "recipes", "--recipe", "mine"], "must be LABEL=OPTIONS",
                     id="bench recipes: recipe"),
        pytest.param(["bench", "recipes", "--recipe", 'mine={"policy": "quest", "lcal": 1}'],
                     "did you mean 'local'?", id="bench recipes: options"),
        pytest.param(["bench", "recipes", "--budgets", "512,7"], "at least one page",
                     id="bench recipes: budget"),
        pytest.param(["bench", "recipes", "--needles", "1,2"], "3 contexts and 2 numbers",
                     id="bench recipes: needles"),
        pytest.param(["bench", "recipes", "--from", "no-such-file"], "cannot be read",
                     id="bench recipes: from"),
        pytest.param(["demo", "--policy", "simhsh"],
                     "Unknown policy 'simhsh': did you mean 'simhash'?", id="demo: policy"),
        pytest.param(["demo", "--budget", "0"], "budget=0", id="demo: budget"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    sentence: str,
    served: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said before anything heavy starts: no server, no engine, no document."""

    def started(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started before the options were checked")

    monkeypatch.setattr(subprocess, "Popen", started)
    assert run(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("error: ")
    assert not served


def test_help_shows_every_option_with_its_default() -> None:
    shown = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0
    text = " ".join(shown.output.split())
    for name, field in KvplugConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert (
            f"{field.description} (default {field.get_default(call_default_factory=True)})" in text
        )


def test_bench_without_a_name_compares_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its JSON is the rows, last on stdout."""
    from kvplug.bench import compare

    asked: list[Any] = []

    def compared(job: Any, policies: Any, dense_repeats: int, say: Any, rows: Any) -> None:
        asked.append((job.contexts, policies, dense_repeats))
        rows.append({"policy": "dense"})

    monkeypatch.setattr(compare, "compare", compared)
    for name in ([], ["policies"]):
        arguments = ["bench", *name, "--json", "--contexts", "600", "--policies", "quest,simhash"]
        shown = CliRunner().invoke(cli.app, arguments)
        assert shown.exit_code == 0
        assert json.loads(shown.stdout.strip().splitlines()[-1]) == [{"policy": "dense"}]
    assert asked == [([600], ["quest", "simhash"], 3)] * 2


def test_benchmarks() -> None:
    shown = CliRunner().invoke(cli.app, ["bench", "--help"])
    assert shown.exit_code == 0
    for name in ("policies", "recipes"):
        assert name in shown.output
    assert CliRunner().invoke(cli.app, ["bench", "recpes"]).exit_code == 2


def test_commands() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"])
    assert shown.exit_code == 0
    for command in ("serve", "demo", "bench", "doctor"):
        assert command in shown.output
    assert CliRunner().invoke(cli.app, ["srve"]).exit_code == 2


def test_the_command_line_is_light() -> None:
    """Help must not wait for vLLM; and the module runs as a program."""
    code = (
        "import sys, kvplug.cli; "
        "print(*sorted({'vllm', 'torch', 'triton', 'numba'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []
    program = [sys.executable, "-m", "kvplug", "serve", "m", "--budget", "0"]
    ended = subprocess.run(program, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: kvplug option budget=0")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
