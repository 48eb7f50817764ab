"""A layer's rotary embedding is found, and what does not turn keys as it says is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from kvplug.attention.rotary_of import rotary_of
from kvplug.errors import KvplugError

HIDDEN, HEADS, DIM, LONGEST = 24, 2, 32, 512
Hand = Callable[["Around", torch.Tensor, torch.Tensor, torch.Tensor], Any]


class Layer(torch.nn.Module):
    """vLLM's attention, as far as it is looked at."""

    head_size = DIM

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        raise AssertionError("a layer without a cache must not attend")


class Around(torch.nn.Module):
    """The module around a layer.

    Args:
        hand: What it hands to its layer.
        rope: Parameters of its rotary embedding.
        dtype: Of its weights.
    """

    def __init__(self, hand: Hand, rope: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.rotary_emb = get_rope(
            DIM, LONGEST, rope.pop("is_neox", True),
            {"rope_type": "default", "rope_theta": 1e4, **rope}, dtype,
        )  # fmt: skip
        self.attn = Layer()
        self.weights = torch.nn.Parameter(torch.randn(2, HIDDEN, HEADS * DIM).to(dtype))
        self.hand = hand

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> Any:
        query, key = torch.matmul(hidden, self.weights)
        return self.attn(*self.hand(self, positions, query, key), key)


def usual(around: Around, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
    return around.rotary_emb(positions, query, key)


def without(around: Around, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
    """As the layers of some models that have an embedding and do not use it."""
    return query, key


def scaled(around: Around, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
    """Queries grow with their positions, as Llama 4's."""
    query, key = usual(around, positions, query, key)
    return query * (1 + 0.1 * torch.log1p(positions[:, None] / 10)).to(query.dtype), key


def failing(around: Around, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
    raise RuntimeError("needs a forward context")


@pytest.fixture(autouse=True)
def config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


def found(model: torch.nn.Module, layer: torch.nn.Module, longest: int = LONGEST) -> Any:
    dtype = next(model.parameters()).dtype
    return rotary_of(model, layer, "layer 3", HIDDEN, dtype, longest)


def refusal(model: torch.nn.Module, layer: torch.nn.Module, longest: int = LONGEST) -> str:
    with pytest.raises(KvplugError) as caught:
        found(model, layer, longest)
    message = str(caught.value)
    assert "layer 3" in message
    assert message.endswith(".")
    return message


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "interleaved": {"is_neox": False},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_vllm_are_found(kind: str, dtype: torch.dtype) -> None:
    around = Around(usual, dict(KINDS[kind]), dtype)
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2, dtype=dtype), around])
    rotary = found(model, around.attn)
    assert rotary.table is around.rotary_emb.cos_sin_cache
    assert rotary.is_neox == around.rotary_emb.is_neox_style
    with pytest.raises(AssertionError, match="without a cache"):
        around(torch.arange(2), torch.zeros(2, HIDDEN, dtype=dtype))  # the layer is itself again


@pytest.mark.parametrize(
    ("hand", "what"),
    [(without, "queries that turn"), (scaled, "queries that turn"), (failing, "RuntimeError")],
    ids=["none", "scaled", "failing"],
)
def test_what_is_not_turned_so_is_refused(hand: Hand, what: str) -> None:
    around = Around(hand, {}, torch.float32)
    assert what in refusal(around, around.attn)


def test_a_layer_without_an_embedding_is_refused() -> None:
    around = Around(usual, {}, torch.float32)
    del around.rotary_emb
    assert "none" in refusal(around, around.attn)
    assert "none" in refusal(torch.nn.Linear(2, 2), around.attn)


def test_an_embedding_of_another_kind_is_refused() -> None:
    # vLLM hands the same module to all who ask for the same; nobody else asks for this one.
    around = Around(usual, {"rope_theta": 77.0}, torch.float32)
    around.rotary_emb.cos_sin_cache = around.rotary_emb.cos_sin_cache[:, :, None]
    assert "RotaryEmbedding" in refusal(around, around.attn)


def test_a_table_that_is_too_short_is_refused() -> None:
    around = Around(usual, {}, torch.float32)
    assert "--hf-overrides" in refusal(around, around.attn, LONGEST + 1)
