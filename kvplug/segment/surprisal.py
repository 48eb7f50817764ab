"""Surprise of tokens: how unlikely the model held each one to be, from its own logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit, prange

from kvplug.compiled import compiled
from kvplug.errors import KvplugError
from kvplug.numeric import from_bfloat16, power_of_two

LANES = 16
"""Floats in a vector register."""
LOG2_E = np.float32(math.log2(math.e))
LEAST = np.float32(-126)
"""Powers of two below it count as nothing."""
HIGHEST = np.float32(1e4)
"""Nats; a token that the model holds to be impossible is that surprising, so that means exist."""
MOST_LOGITS = 1 << 24
"""Logits of one slice, 64 MiB in float32: memory stays flat however long the chunk."""
ROWS = 64, 512
"""Least and most tokens of a slice."""


class SurpriseMeter:
    """Computes surprises slice by slice."""

    def __init__(self) -> None:
        """Starts with small slices, until the vocabulary's size is known."""
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
            surprise_of(logits, tokens[start:stop], surprise[start:stop])
            start = stop


def surprise_of(logits: torch.Tensor, tokens: torch.Tensor, surprise: torch.Tensor) -> None:
    """Surprises of one slice.

    Args:
        logits: ``[n, V]``, any float dtype.
        tokens: ``[n]``; ids outside the vocabulary have no surprise.
        surprise: ``[n]`` float32, written.
    """
    logits, ids, out = logits.contiguous(), tokens.long().numpy(), surprise.numpy()
    work = logits.numel()
    if logits.dtype == torch.bfloat16:
        _of_bfloat16(work, logits.view(torch.uint16).numpy(), ids, out)
    else:
        _of_float32(work, logits.float().numpy(), ids, out)


@compiled()
def _of_float32(logits, tokens, surprise):  # type: ignore[no-untyped-def]
    """See :func:`surprise_of`."""
    for n in prange(tokens.shape[0]):
        surprise[n] = _surprise(logits[n], tokens[n])


@compiled()
def _of_bfloat16(logits, tokens, surprise):  # type: ignore[no-untyped-def]
    """The same, of bfloat16 bits."""
    for n in prange(tokens.shape[0]):
        row = np.empty(logits.shape[1], dtype=np.float32)
        for v in range(row.shape[0]):
            row[v] = from_bfloat16(logits[n, v])
        surprise[n] = _surprise(row, tokens[n])


@njit(cache=True, fastmath={"contract"})
def _surprise(row, token):  # type: ignore[no-untyped-def]
    """``log sum exp(row) - row[token]``; NaN where a logit is none or the token is not there.

    Lane by lane, which the compiler can run on vectors.
    """
    size, lanes = row.shape[0], np.full(LANES, -np.inf, dtype=np.float32)
    whole, odd = size - size % LANES, np.int64(0)
    for first in range(0, whole, LANES):
        part = row[first : first + LANES]
        for lane in range(LANES):
            lanes[lane] = part[lane] if part[lane] > lanes[lane] else lanes[lane]
            odd += part[lane] != part[lane]
    top = lanes.max()
    for v in range(whole, size):
        top = row[v] if row[v] > top else top
        odd += row[v] != row[v]
    if odd > 0 or not np.isfinite(top) or token < 0 or token >= size:
        return np.float32(np.nan)
    lanes[:] = 0
    for first in range(0, whole, LANES):
        part = row[first : first + LANES]
        for lane in range(LANES):
            x = (part[lane] - top) * LOG2_E
            power = power_of_two(x if x > LEAST else LEAST)
            lanes[lane] += power if x > LEAST else np.float32(0)
    total = lanes.sum()
    for v in range(whole, size):
        x = (row[v] - top) * LOG2_E
        total += power_of_two(x) if x > LEAST else np.float32(0)
    found = np.float32(np.log(total)) + (top - row[token])
    return min(found, HIGHEST)


def surprise_reference(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Twin of :func:`surprise_of` by the formula, ``[n]`` float64; tokens in the vocabulary."""
    exact = logits.double()
    log_sum = (exact - exact.amax(-1, keepdim=True)).exp().sum(-1).log() + exact.amax(-1)
    return log_sum - exact[torch.arange(len(tokens)), tokens.long()]
