"""Peers answer the same prompts with as many tokens kept; kvpress itself is not needed here."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvplug.errors import KvplugError
from kvplug.evals.attended import attended_tokens
from kvplug.evals.kvpress_answers import compression, methods, reply
from kvplug.evals.local import groups
from kvplug.evals.peers import METHODS, VARIABLE, peer_replies, peers_python, setups_of_peers
from kvplug.evals.plan import Answer, Question, Settings, Setup
from kvplug.evals.prompts import Prompts
from kvplug.evals.run import setups_of
from kvplug.evals.summary import summarise
from kvplug.models.recall import recall_model_path

SETTINGS = Settings("recall", "prose", True, 32, 4096, False, False, "a processor", 1, {})
TEXT = "the password of the old lighthouse is crimson harbor seven. " * 2 + "the password of the"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(recall_model_path(), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(recall_model_path())


def test_a_peer_keeps_what_kvplug_attends_to() -> None:
    (ours,) = [setup for setup in setups_of(["simhash"], [512], {}) if setup.budget]
    (theirs,) = setups_of_peers(["snapkv"], [512])
    for prompt in (100, 4096, 4097, 8192, 32768):
        assert attended_tokens(theirs, 32, prompt) == attended_tokens(ours, 32, prompt)
    assert attended_tokens(theirs, 32, 32768) == 64 + 512 + 512
    assert attended_tokens(theirs, 32, 4000) == 4000


@pytest.mark.parametrize("seen", [1089, 4999, 8191, 32767, 131071])
def test_the_share_to_drop_keeps_exactly_so_many(seen: int) -> None:
    for kept in (1, 7, 320, 1088, seen - 1):
        assert int(seen * (1 - compression(kept, seen))) == kept


def test_without_pruning_it_is_greedy_decoding(model: Any, tokenizer: Any) -> None:
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    greedy = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    said = reply(model, tokenizer, None, TEXT, 12)
    assert said["tokens"] == greedy.tolist()
    assert "crimson harbor seven" in said["output"]
    assert said["ttft_s"] > 0


def test_the_answer_sees_what_was_kept_and_nothing_else(model: Any, tokenizer: Any) -> None:
    """A method that keeps the first four tokens: no token may come from dense attention."""
    seen = []

    @contextmanager
    def press(pruned: Any) -> Iterator[None]:
        def prune(module: Any, _: Any, given: dict[str, Any], output: Any) -> Any:
            layer = given["past_key_values"].layers[module.layer_idx]
            seen.append(layer.keys.shape[2])
            layer.keys, layer.values = layer.keys[:, :, :4], layer.values[:, :, :4]
            return output

        hooks = [
            layer.self_attn.register_forward_hook(prune, with_kwargs=True)
            for layer in pruned.model.layers
        ]
        yield
        for hook in hooks:
            hook.remove()

    dense = reply(model, tokenizer, None, TEXT, 4)
    pruned = reply(model, tokenizer, press, TEXT, 4)
    assert seen == [len(tokenizer(TEXT)["input_ids"]) - 1] * len(model.model.layers)
    assert pruned["tokens"][0] != dense["tokens"][0]


def test_every_peer_is_a_class_of_kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("SnapKVPress", "TOVAPress", "ExpectedAttentionPress", "KnormPress")
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(**{name: name for name in names}))
    assert tuple(methods()) == METHODS
    assert tuple(methods().values()) == names


def test_unknown_peers_and_a_missing_python_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(KvplugError, match="no peer 'snap'"):
        setups_of_peers(["snap"], [512])
    for path in (tmp_path_factory.mktemp("none") / "python", sys.executable):
        monkeypatch.setenv(VARIABLE, str(path))
        with pytest.raises(KvplugError, match="make peers"):
            peers_python()


def fake_python(folder: Path, body: str) -> str:
    """A Python that has kvpress, as far as one can tell, and says what it is told."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exit 0; fi\ncat > /dev/null\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_what_was_said_before_a_failure_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    line = '[0, {"output": "a", "tokens": [1], "ttft_s": 1.0, "decode_tok_s": null}]'
    body = f"echo noise\necho 'REPLY {line}'\necho 'out of luck' >&2\nexit 3"
    folder = tmp_path_factory.mktemp("peer")
    monkeypatch.setenv(VARIABLE, fake_python(folder, body))
    prompts = Prompts(SETTINGS, lambda text: len(text.split()))
    setup = setups_of_peers(["knorm"], [512])[0]
    asked = [(setup, Question("passkey", 600, number)) for number in range(2)]
    replies = peer_replies(SETTINGS, prompts, asked)
    assert next(replies)[2].output == "a"
    with pytest.raises(KvplugError, match="Peer 'knorm' failed: out of luck"):
        next(replies)


def test_peers_have_engines_of_their_own_and_no_speed() -> None:
    setups = [Setup("dense", "dense"), *setups_of_peers(["snapkv", "knorm"], [256, 512])]
    assert [len(group) for group in groups(setups)] == [1, 2, 2]
    answer = Answer("dense", "passkey", 8192, 0, 8000, 0.5, "x", [1], 1.0, 2.0, 10.0)
    answers = [answer, replace(answer, setup="snapkv@256", ttft_s=1.0, decode_tok_s=None)]
    row = next(row for row in summarise(answers, setups, 32) if row.setup == "snapkv@256")
    assert row.accuracy.value == 1
    assert row.ttft_ratio is None
    assert row.decode_ratio is None
