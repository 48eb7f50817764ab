"""Shows kvplug the model's output, for recipes that learn from it (surprise)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kvplug.patches.record import Patch
from kvplug.selection import is_selected


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _model_forward(
        self: Any, input_ids: Any = None, positions: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        output = original(self, input_ids, positions, *args, **kwargs)
        if is_selected(self.vllm_config):
            # A multi-modal model gets embeddings; the runner has the ids all the same.
            tokens = self.input_ids.gpu if input_ids is None else input_ids
            # Beside an EAGLE drafter, a model returns hidden states of other layers too.
            learn(output[0] if isinstance(output, tuple) else output, tokens, self.model)
        return output

    return _model_forward


def learn(hidden: Any, tokens: Any, model: Any) -> None:
    """Hands the output of the step that runs to every group of layers that learns from it.

    Args:
        hidden: ``[T, hidden_size]``, padding behind it.
        tokens: ``[T]``, padding behind them.
        model: vLLM's model.
    """
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, dict):
        for group in {id(each): each for each in metadata.values()}.values():
            group.learn(hidden, tokens, model)


PATCHES = [
    Patch(
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
        vllm=">=0.32,<0.33",
        why="Surprise needs the hidden state of every prompt token, and vLLM hands prompt "
        "log-probabilities to requests that ask for them only. A forward hook on the model would "
        "not do: vLLM's compiler replaces __call__ of some models, and hooks then never run.",
        upstream="https://github.com/vllm-project/vllm/issues/42449",
        remove_when="A plugin can see the hidden states of a step.",
        fingerprint="a8f98588a4656ef6",
        wrap=_wrap,
    )
]
