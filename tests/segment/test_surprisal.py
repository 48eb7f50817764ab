"""Surprise is -log p of the token, slice by slice, and says so where it is unknown."""

from __future__ import annotations

import pytest
import torch

from kvplug.errors import KvplugError
from kvplug.segment.surprisal import HIGHEST, MOST_LOGITS, SurpriseMeter, surprise_reference


class Head:
    """A linear head that notes how many rows it was asked for."""

    def __init__(self, vocabulary: int, dtype: torch.dtype = torch.float32) -> None:
        self.weight = torch.randn(vocabulary, 8, dtype=dtype)
        self.rows: list[int] = []

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        self.rows.append(len(hidden))
        return hidden @ self.weight.T


def measured(hidden: torch.Tensor, tokens: torch.Tensor, head: object) -> torch.Tensor:
    surprise = torch.empty(len(tokens))
    SurpriseMeter().measure(hidden, tokens, head, surprise)
    return surprise


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_formula(tokens: int, dtype: torch.dtype) -> None:
    head, hidden = Head(33, dtype), torch.randn(tokens, 8, dtype=dtype)
    said = torch.randint(0, 33, (tokens,), dtype=torch.int32)
    expected = surprise_reference(hidden @ head.weight.T, said)
    # The head's matrix product may round otherwise where it has other rows: one unit of a logit.
    off = 1e-5 if dtype is torch.float32 else 0.2
    torch.testing.assert_close(measured(hidden, said, head).double(), expected, rtol=0, atol=off)
    logits = hidden @ head.weight.T
    exact = surprise_reference(logits, said)
    fixed = type("Fixed", (), {"compute_logits": staticmethod(lambda rows: logits[: len(rows)])})
    if tokens <= 64:  # one slice, the same logits: float32 rounding alone
        torch.testing.assert_close(
            measured(hidden, said, fixed).double(), exact, rtol=1e-6, atol=1e-5
        )


def test_two_equal_tokens_are_one_bit() -> None:
    head = type("Even", (), {"compute_logits": staticmethod(lambda h: torch.zeros(len(h), 2))})
    assert measured(torch.zeros(3, 1), torch.tensor([0, 1, 0]), head).tolist() == pytest.approx(
        [0.6931472] * 3
    )


def test_slices_are_bounded() -> None:
    """However long the chunk: 64 MiB of logits, or 64 rows where the vocabulary is that large."""
    head = Head(100_000)
    measured(torch.zeros(1000, 8), torch.zeros(1000, dtype=torch.int64), head)
    assert max(head.rows) * 100_000 <= MOST_LOGITS
    assert sum(head.rows) == 1000
    small = Head(7)
    measured(torch.zeros(2000, 8), torch.zeros(2000, dtype=torch.int64), small)
    assert max(small.rows) == 512


def test_what_has_no_surprise() -> None:
    logits = torch.tensor([[0.0, -torch.inf], [torch.nan, 0.0], [0.0, 0.0], [0.0, 0.0]])
    head = type("Odd", (), {"compute_logits": staticmethod(lambda h: logits)})
    surprise = measured(torch.zeros(4, 1), torch.tensor([1, 0, 2, -1]), head)
    assert surprise[0] == HIGHEST  # impossible: finite, so that means exist
    assert surprise[1:].isnan().all()


def test_a_worker_without_logits_says_so() -> None:
    head = type("None", (), {"compute_logits": staticmethod(lambda h: None)})
    with pytest.raises(KvplugError, match="tensor parallelism"):
        measured(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), head)
