"""The model's output reaches the recipe: once per group of layers, in every form vLLM gives it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import forward_context

from kvplug.attention.metadata import KvplugMetadata
from kvplug.patches import model_output

HIDDEN, TOKENS = torch.randn(5, 4), torch.arange(5)
SELECTED = SimpleNamespace(
    attention_config=SimpleNamespace(
        backend=SimpleNamespace(
            name="CUSTOM", get_path=lambda: "kvplug.attention.backend.KvplugBackend"
        )
    ),
    additional_config={},
)
STOCK = SimpleNamespace(attention_config=SimpleNamespace(backend=None), additional_config={})


class Group:
    """A group of layers that notes what it is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[torch.Tensor, torch.Tensor, Any]] = []

    def learn(self, hidden: torch.Tensor, tokens: torch.Tensor, model: Any) -> None:
        self.shown.append((hidden, tokens, model))


def runner(output: Any, config: Any = SELECTED) -> Any:
    """vLLM's model runner, as far as the patch knows it, whose model gives ``output``."""
    made = SimpleNamespace(
        vllm_config=config, model="model", input_ids=SimpleNamespace(gpu=TOKENS + 7)
    )
    forward = model_output._wrap(lambda self, ids, positions, **rest: output)
    made.forward = lambda ids=TOKENS, **rest: forward(made, ids, None, **rest)
    return made


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """The running step's groups: one of two layers, one of one."""
    made = [Group(), Group()]
    layers = {"a": made[0], "b": made[1], "c": made[0]}
    context = SimpleNamespace(attn_metadata=layers)
    monkeypatch.setattr(forward_context, "_forward_context", context)
    return made


def test_every_group_sees_it_once(groups: list[Group]) -> None:
    assert runner(HIDDEN).forward() is HIDDEN
    for group in groups:
        assert len(group.shown) == 1
        hidden, tokens, model = group.shown[0]
        assert hidden is HIDDEN
        assert tokens is TOKENS
        assert model == "model"


def test_outputs_beside_hidden_states_of_other_layers(groups: list[Group]) -> None:
    output = (HIDDEN, [torch.zeros(1)])
    assert runner(output).forward() is output
    assert groups[0].shown[0][0] is HIDDEN


def test_embeddings_instead_of_tokens(groups: list[Group]) -> None:
    runner(HIDDEN).forward(ids=None, inputs_embeds=HIDDEN)
    assert torch.equal(groups[0].shown[0][1], TOKENS + 7)


def test_other_engines_are_left_alone(groups: list[Group]) -> None:
    assert runner(HIDDEN, STOCK).forward() is HIDDEN
    assert not groups[0].shown


def test_a_profiling_step_has_nobody_to_show_it_to(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(attn_metadata=None)
    monkeypatch.setattr(forward_context, "_forward_context", context)
    assert runner(HIDDEN).forward() is HIDDEN


def test_padding_is_cut_off_and_dense_steps_are_skipped() -> None:
    seen: list[tuple[Any, ...]] = []
    pipeline = SimpleNamespace(learn=lambda *arguments: seen.append(arguments))
    metadata = KvplugMetadata.__new__(KvplugMetadata)
    metadata.num_actual_tokens = 3
    metadata.pipeline = pipeline  # type: ignore[assignment]
    metadata.plan = None
    metadata.learn(HIDDEN, TOKENS, "model")
    assert not seen
    metadata.plan = SimpleNamespace(step="step")  # type: ignore[assignment]
    metadata.learn(HIDDEN, TOKENS, "model")
    hidden, tokens, model, step = seen[0]
    assert torch.equal(hidden, HIDDEN[:3])
    assert torch.equal(tokens, TOKENS[:3])
    assert (model, step) == ("model", "step")
