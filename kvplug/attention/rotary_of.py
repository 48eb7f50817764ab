"""Finds the rotary embedding of an attention layer, and makes sure that it is what turns its keys.

vLLM's attention layers get queries and keys already rotated; what rotated them is a module beside
the layer. That it is there does not say that the model uses it in this layer, for whole heads, or
last (some models skip it in some layers, or scale queries by position afterwards), so the module
around the layer is run, and what it hands to the layer is compared.
"""

from __future__ import annotations

from typing import Any

import torch

from kvplug.errors import KvplugError
from kvplug.rotary import Rotary

TOLERANCE = 0.02
"""Relative; queries and keys are rounded to 8 bits, and wrong ones are off by about 1."""


class _Caught(Exception):
    """Carries what a layer was called with."""


def find_rotary(model: torch.nn.Module, layer: torch.nn.Module, name: str) -> tuple[Any, Rotary]:
    """The module around an attention layer, and the rotary embedding in it.

    Args:
        model: All of the model on this worker.
        layer: vLLM's attention layer.
        name: What messages call it.

    Raises:
        KvplugError: There is none, more than one, or one of a kind that kvplug does not know.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

    around = [m for m in model.modules() if any(child is layer for child in m.children())]
    beside = around[0].children() if around else ()
    found = [module for module in beside if isinstance(module, RotaryEmbeddingBase)]
    if len(found) != 1:
        raise KvplugError(
            f"kvplug option positions='fixed' needs one rotary embedding beside each attention "
            f"layer, and {name} has {len(found) or 'none'}: use positions 'orig'."
        )
    rotary = found[0]
    table = getattr(rotary, "cos_sin_cache", None)
    if not isinstance(table, torch.Tensor) or table.shape[1:] != (rotary.rotary_dim,):
        raise KvplugError(
            f"kvplug option positions='fixed' does not know how {type(rotary).__name__} of {name} "
            f"turns keys: use positions 'orig'."
        )
    return around[0], Rotary(table, bool(rotary.is_neox_style))


def rotary_of(
    model: torch.nn.Module, layer: torch.nn.Module, name: str, hidden_size: int,
    dtype: torch.dtype, max_model_len: int,
) -> Rotary:  # fmt: skip
    """The rotary embedding by which queries and keys of a layer were turned.

    Args:
        model: All of the model on this worker.
        layer: vLLM's attention layer.
        name: What messages call it.
        hidden_size: Of the model.
        dtype: Of its hidden states.
        max_model_len: Longest context, in tokens.

    Raises:
        KvplugError: It cannot be told, or its table is too short.
    """
    around, rotary = find_rotary(model, layer, name)
    longest = len(rotary.table)
    if longest < max_model_len:
        raise KvplugError(
            f"The rotary table of {name} has {longest} positions and --max-model-len is "
            f"{max_model_len}: raise max_position_embeddings by --hf-overrides as well."
        )
    positions = torch.tensor([0, 1, max_model_len // 2, max_model_len - 1])
    hidden = torch.randn(hidden_size, generator=torch.Generator().manual_seed(0))
    given = _handed_to(layer, around, positions, hidden.to(dtype).repeat(len(positions), 1), name)
    for what, vectors in zip(("queries", "keys"), given, strict=True):
        rows = vectors.reshape(len(positions), -1, layer.head_size).float()
        turn = rotary.turn(torch.tensor(0), positions[:, None])
        expected = rotary.apply(rows[:1].repeat(len(positions), 1, 1), turn)
        if (rows - expected).norm() > TOLERANCE * expected.norm():
            raise KvplugError(
                f"kvplug option positions='fixed' needs {what} that turn with their position as "
                f"the rotary embedding says, and those of {name} do not: use positions 'orig'."
            )
    return rotary


def _handed_to(
    layer: Any, around: Any, positions: torch.Tensor, hidden: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys that the module around a layer hands to it, ``[n, heads * D]`` each.

    Raises:
        KvplugError: The module cannot be run by itself.
    """

    def catch(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Caught(query, key)

    layer.forward = catch
    try:
        with torch.inference_mode():
            around(positions, hidden)
    except _Caught as caught:
        query, key = caught.args
        return query, key
    except Exception as error:
        raise KvplugError(
            f"kvplug option positions='fixed' runs the module around {name} to see how it turns "
            f"keys, and that failed ({type(error).__name__}): use positions 'orig'."
        ) from error
    finally:
        del layer.forward
    raise KvplugError(
        f"kvplug option positions='fixed' cannot see how {name} gets its keys: use positions "
        f"'orig'."
    )
