"""The recall model: two attention layers, written down rather than trained, that recall exactly.

An induction head (Olsson et al. 2022, "In-context Learning and Induction Heads") finds the place
where the last tokens occurred before and says what followed. Here its weights come from formulas,
so the answer is exact at any context length up to 1.1 million tokens, and a wrong answer can only
come from the attention underneath.

The residual stream is seven slots of 64 numbers, all ±1: the current token's code, the codes of the
four tokens before it, the output, and a constant.

- Layer 0, KV head k: attends to the token k + 1 back, by position alone, and copies its code into
  lag slot k + 1. Queries and keys are constants; the query is turned back by k + 1 positions.
- Layer 1: a key holds 18 of the 64 numbers of each lag code, the query the same numbers of the
  current token and the first three lags. Both meet where the preceding four tokens equal the last
  four; the value is the token there. KV heads differ in the 18 numbers. The group's first query
  head compares four tokens, the second three at half the weight: it breaks ties where only three
  occurred before.
- The head reads the output slot with the token codes. `<|end|>` also reads the current token, along
  the code of ".": the model ends its turn after a full stop, whatever followed it in the context.

RoPE serves both ends: the fastest 18 frequency pairs tell positions apart, the slowest 36 turn by
at most 0.3 rad over the whole range and so carry content.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from kvplug.models.cache import cached_model, recipe_version
from kvplug.models.checkpoint import write_checkpoint
from kvplug.models.codes import SUBCODES, WIDTH, token_codes
from kvplug.models.tokenizer import END, SPECIALS, vocabulary

LAGS = 4
SLOTS = LAGS + 3  # current token, lags, output, constant
OUTPUT, CONSTANT = LAGS + 1, LAGS + 2
THETA = 1e15
SHORT_THETA = 1e5
"""Of the short recall model, whose slow pairs turn as a usual model's."""
GEOMETRY = {
    "hidden_size": SLOTS * WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 1_100_000,
    "rope_theta": THETA,
}
HEAD_DIM = 128
GROUP = 2  # query heads of a KV head
PAIRS = HEAD_DIM // 2

# Logit of a position pair in layer 0: the steep ones separate neighbours, the others the distant
# near-coincidences of the steep ones. Together they leave 2e-6 of the mass to all wrong distances
# up to 1.1 million.
POSITION_WEIGHTS = (20.0,) * 3 + (5.0,) * 15
# Layer 1: the first pair used turns 0.3 rad in 1.1 million tokens.
FIRST_CONTENT_PAIR = 28
# Logit of one equal number of the 72: a token that differs in one of four costs 16 or
# more, at any distance, so even 250,000 nearest misses keep less than 0.04 of the mass.
MATCH_WEIGHT = 3.0
OUTPUT_WEIGHTS = (1 / 6, 1 / 12)  # of a group's two query heads; four KV heads make 1
# Logit of the recalled token. Other tokens reach a quarter of it: sampling at temperature 1 is
# as good as greedy.
TOKEN_LOGIT = 40.0
# `<|end|>` after ".": above any recalled token (1), and below it after any other token (1/4 of it).
END_WEIGHT = 1.75


def _slot(index: int) -> slice:
    """The residual's entries of a slot."""
    return slice(index * WIDTH, (index + 1) * WIDTH)


def _norm_gain(filled_slots: int) -> float:
    """What RMSNorm multiplies by where that many slots hold ±1 and the rest zeros."""
    return math.sqrt(SLOTS / filled_slots)


def _copy(slot_from: int, weight: float) -> torch.Tensor:
    """`[128, 448]`: a head's first 64 dims are `weight` times a slot."""
    matrix = torch.zeros(HEAD_DIM, SLOTS * WIDTH)
    matrix[:WIDTH, _slot(slot_from)] = weight * torch.eye(WIDTH)
    return matrix


def lag_vector(lag: int, theta: float = THETA) -> torch.Tensor:
    """A constant whose product with the one of lag 0 peaks `lag` positions back, `[128]`.

    RoPE turns pair i, the dims i and i + 64, by `position * theta ** (-i / 64)`.
    """
    angle = -lag * theta ** (-torch.arange(PAIRS).double() / PAIRS)
    size = torch.zeros(PAIRS, dtype=torch.float64)
    weights = torch.tensor(POSITION_WEIGHTS, dtype=torch.float64)
    size[: len(weights)] = (weights * math.sqrt(HEAD_DIM)).sqrt()
    return torch.cat([size * angle.cos(), size * angle.sin()]).float()


def _lag_layer(theta: float) -> dict[str, torch.Tensor]:
    """Layer 0: KV head k writes the code of the token k + 1 back into slot k + 1."""
    gain = _norm_gain(2)
    constant = torch.zeros(SLOTS * WIDTH)
    constant[_slot(CONSTANT)] = 1 / (gain * WIDTH)
    keys = [torch.outer(lag_vector(0, theta), constant)] * LAGS
    lags = [lag_vector(k // GROUP + 1, theta) for k in range(GROUP * LAGS)]
    queries = [torch.outer(lag, constant) for lag in lags]
    outputs = [_copy(k // GROUP + 1, 1 / (GROUP * gain)).T for k in range(GROUP * LAGS)]
    return {
        "q_proj": torch.cat(queries),
        "k_proj": torch.cat(keys),
        "v_proj": torch.cat([_copy(0, 1.0)] * LAGS),
        "o_proj": torch.cat(outputs, dim=1),
    }


def _compare(head: int, first_slot: int, lags: int, gain: float) -> torch.Tensor:
    """Query or key weights of the matching layer, `[128, 448]`.

    The slots take turns at the pairs, so that each has fast and slow ones.

    Args:
        head: KV head; says which 18 numbers of a code are compared.
        first_slot: Slot of the latest token: 0 for a query, 1 for a key.
        lags: How many tokens count; the rest is left at zero.
        gain: RMSNorm's.
    """
    matrix = torch.zeros(HEAD_DIM, SLOTS * WIDTH)
    weight = math.sqrt(MATCH_WEIGHT * math.sqrt(HEAD_DIM)) / gain
    for lag in range(lags):
        for number, column in enumerate(SUBCODES[head]):
            pair = FIRST_CONTENT_PAIR + LAGS * (number // 2) + lag
            row = pair + PAIRS * (number % 2)
            matrix[row, (first_slot + lag) * WIDTH + column] = weight
    return matrix


def _match_layer() -> dict[str, torch.Tensor]:
    """Layer 1: finds the last tokens' earlier occurrence, copies what followed to the output."""
    gain = _norm_gain(LAGS + 2)
    heads = range(len(SUBCODES))
    queries = [_compare(h, 0, lags, gain) for h in heads for lags in (LAGS, LAGS - 1)]
    outputs = [_copy(OUTPUT, weight / gain).T for _ in heads for weight in OUTPUT_WEIGHTS]
    return {
        "q_proj": torch.cat(queries),
        "k_proj": torch.cat([_compare(h, 1, LAGS, gain) for h in heads]),
        "v_proj": torch.cat([_copy(0, 1.0)] * len(SUBCODES)),
        "o_proj": torch.cat(outputs, dim=1),
    }


def _head(codes: torch.Tensor, tokens: list[str]) -> torch.Tensor:
    """The output matrix, `[V, 448]`; specials other than `<|end|>` are never said."""
    head = torch.zeros(len(tokens), SLOTS * WIDTH)
    head[:, _slot(OUTPUT)] = codes * TOKEN_LOGIT / WIDTH
    for i, token in enumerate(tokens):
        if token.startswith("<|reserved") or (token in SPECIALS and token != END):
            head[i] = 0
    end_row = head[tokens.index(END)]
    end_row[_slot(0)] = codes[tokens.index(".")] * END_WEIGHT * TOKEN_LOGIT / WIDTH
    return head


def recall_tensors(theta: float = THETA) -> dict[str, torch.Tensor]:
    """All weights of a recall model in float32, under `LlamaForCausalLM`'s names.

    Args:
        theta: RoPE's base.
    """
    tokens = vocabulary()
    codes = token_codes(len(tokens))
    embedding = torch.zeros(len(tokens), SLOTS * WIDTH)
    embedding[:, _slot(0)] = codes
    embedding[:, _slot(CONSTANT)] = 1.0
    hidden, inner = GEOMETRY["hidden_size"], GEOMETRY["intermediate_size"]
    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(SLOTS * WIDTH),
        "lm_head.weight": _head(codes, tokens),
    }
    for i, attention in enumerate((_lag_layer(theta), _match_layer())):
        layer = f"model.layers.{i}"
        for name, weight in attention.items():
            tensors[f"{layer}.self_attn.{name}.weight"] = weight
        for name in ("gate_proj", "up_proj"):
            tensors[f"{layer}.mlp.{name}.weight"] = torch.zeros(int(inner), int(hidden))
        tensors[f"{layer}.mlp.down_proj.weight"] = torch.zeros(int(hidden), int(inner))
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = torch.ones(int(hidden))
    return tensors


def build_recall_model(directory: Path, theta: float = THETA) -> Path:
    """Writes a recall model with its tokenizer into `directory`, about 11 MB; no randomness.

    Args:
        directory: Made if it is not there.
        theta: RoPE's base.

    Returns:
        `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    geometry = {**GEOMETRY, "rope_theta": theta}
    return write_checkpoint(directory, recall_tensors(theta), geometry)


def recall_model_path() -> Path:
    """The recall model's folder in the cache, built on the first call."""
    version = recipe_version("checkpoint.py", "codes.py", "recall.py")
    return cached_model(f"recall-{version}", build_recall_model)


def short_recall_model_path() -> Path:
    """The short recall model's folder in the cache, built on the first call.

    The same model, but the pairs that it compares tokens by turn by up to 0.0065 rad a token, so
    that it finds what is some hundred tokens back and loses what is further away, as a model does
    that was trained on short contexts. Positions that are fixed near the query bring it back.
    """
    version = recipe_version("checkpoint.py", "codes.py", "recall.py")
    return cached_model(
        f"short-recall-{version}", lambda directory: build_recall_model(directory, SHORT_THETA)
    )
