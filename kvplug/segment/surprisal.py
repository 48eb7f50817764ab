"""Surprise of tokens: how unlikely the model held each one to be, from its own logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvplug.errors import KvplugError

if TYPE_CHECKING:
    from kvplug.workspace import Workspace

HIGHEST = 1e4
"""Nats; a token that the model holds to be impossible is that surprising, so that means exist."""
MOST_LOGITS = 1 << 24
"""Logits of one slice, 64 MiB in float32: memory stays flat however long the chunk."""
ROWS = 64, 512
"""Least and most tokens of a slice."""


class SurpriseMeter:
    """Computes surprises slice by slice.

    Args:
        workspace: Where log-probabilities live.
    """

    def __init__(self, workspace: Workspace) -> None:
        """Starts with small slices, until the vocabulary's size is known."""
        self._workspace = workspace
        self._rows = ROWS[0]

    def measure(
        self, before: torch.Tensor, tokens: torch.Tensor, model: Any, surprise: torch.Tensor
    ) -> None:
        """Writes ``-log p(token | everything before it)`` for every token.

        Args:
            before: ``[T, hidden_size]`` hidden state of the position before each token. Softcaps
                and scales of logits are the model's own business: ``compute_logits`` applies them.
            tokens: ``[T]`` token ids.
            model: Has ``compute_logits``.
            surprise: ``[T]`` float32, written: nats, NaN where the logits or the token say nothing.

        Raises:
            KvplugError: This worker gets no logits.
        """
        start = 0
        while start < len(tokens):
            stop = min(start + self._rows, len(tokens))
            logits = model.compute_logits(before[start:stop])
            if logits is None:
                raise KvplugError(
                    "Surprise needs logits on every worker, and this one gets none: serve without "
                    "tensor parallelism, or choose another policy."
                )
            self._rows = min(max(MOST_LOGITS // logits.shape[1], ROWS[0]), ROWS[1])
            log_p = self._workspace.take("segment.log_p", tuple(logits.shape), torch.float32)
            surprise_of(logits, tokens[start:stop], log_p, surprise[start:stop])
            start = stop


def surprise_of(
    logits: torch.Tensor, tokens: torch.Tensor, log_p: torch.Tensor, surprise: torch.Tensor
) -> None:
    """Surprises of one slice.

    Args:
        logits: ``[n, V]``.
        tokens: ``[n]``; ids outside the vocabulary have no surprise.
        log_p: ``[n, V]`` float32 scratch.
        surprise: ``[n]`` float32, written.
    """
    torch.log_softmax(logits, -1, dtype=torch.float32, out=log_p)
    inside = tokens.long().clamp(0, logits.shape[1] - 1)
    torch.gather(log_p, 1, inside[:, None], out=surprise[:, None])
    surprise.neg_().clamp_(max=HIGHEST)
    surprise[inside != tokens] = torch.nan


def surprise_reference(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Twin of :func:`surprise_of` by the formula, ``[n]`` float64; tokens in the vocabulary."""
    exact = logits.double()
    log_sum = (exact - exact.amax(-1, keepdim=True)).exp().sum(-1).log() + exact.amax(-1)
    return log_sum - exact[torch.arange(len(tokens)), tokens.long()]
