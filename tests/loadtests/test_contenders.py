"""Servers are started alike, by names that exist; running ones are named by their URL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.contenders import Serving, running, started
from kvplug.serve.server import Server, free_port
from tests.loadtests.conftest import FAKE
from tests.loadtests.made_up import settings


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder that says how large a model is."""
    shape = {
        "model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 128,
        "hidden_size": 1024, "num_attention_heads": 8, "max_position_embeddings": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return str(tmp_path)


def serving(model: str, page: int = 32) -> Serving:
    return Serving(model, 512, page, 4096, False, ["--max-num-seqs", "4"])


def test_commands_differ_in_what_is_compared_alone(model: str) -> None:
    dense, simhash = started(["dense", "simhash", "dense"], settings(), serving(model))
    assert dense.command[:4] == ["-m", "kvplug.serve.launch", "serve", model]
    assert simhash.command[:4] == ["-m", "kvplug", "serve", model]
    flags = dense.command[4:]
    assert simhash.command[4:] == ["--policy", "simhash", "--budget", "512", *flags]
    assert flags[-2:] == ["--max-num-seqs", "4"]
    assert int(flags[flags.index("--max-model-len") + 1]) >= 300 + 16
    assert dense.environment == {**simhash.environment, "VLLM_PLUGINS": ""}


@pytest.mark.parametrize(
    ("names", "page", "words"),
    [(["simhsh"], 32, "did you mean 'simhash'"), (["dense", "simhash"], 24, "24")],
)
def test_nonsense_is_refused(model: str, names: list[str], page: int, words: str) -> None:
    with pytest.raises(KvplugError, match=words):
        started(names, settings(), serving(model, page))


def test_prompts_must_fit_the_model(model: str) -> None:
    with pytest.raises(KvplugError, match="longer than the model's 1000 positions"):
        started(["dense"], settings(lengths="fixed:990"), serving(model))


def test_running_servers() -> None:
    found = running(["http://127.0.0.1:1", "b=http://127.0.0.1:2/v1", "http://127.0.0.1:3?a=b"])
    assert [(c.label, c.url) for c in found] == [
        ("server 1", "http://127.0.0.1:1/v1"), ("b", "http://127.0.0.1:2/v1"),
        ("server 3", "http://127.0.0.1:3?a=b/v1"),
    ]  # fmt: skip
    assert running(["http://127.0.0.1:1"])[0].label == "server"
    with pytest.raises(KvplugError, match="Two servers are called 'a'"):
        running(["a=http://127.0.0.1:1", "a=http://127.0.0.1:2"])


def test_a_running_server_says_what_it_serves(fake: Callable[..., Server]) -> None:
    (contender,) = running([fake().url])
    with contender.ready(None, "") as ready:
        assert ready.model == "fake"
        assert ready.trouble() is None


def test_nobody_there() -> None:
    (contender,) = running([f"http://127.0.0.1:{free_port()}"])
    with pytest.raises(KvplugError, match="cannot be reached"), contender.ready(None, ""):
        raise AssertionError


def test_a_started_server_is_watched(tmp_path: Path) -> None:
    import psutil

    from kvplug.loadtests.contenders import Contender

    with Contender("a", command=FAKE).ready(tmp_path / "log", "") as ready:
        assert ready.trouble() is None
        (server,) = (
            child for child in psutil.Process().children() if "fake_server" in str(child.cmdline())
        )
        server.kill()
        psutil.wait_procs([server], timeout=0.1)
        while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
            pass
        assert "the server died" in str(ready.trouble())
