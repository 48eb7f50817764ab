"""Scores on answers whose worth is known."""

from __future__ import annotations

import pytest

from kvplug.evals.metrics import METRICS
from kvplug.evals.tasks.base import Example


def example(*answers: str, candidates: tuple[str, ...] = ()) -> Example:
    return Example("", "", "", answers, None, candidates)


@pytest.mark.parametrize(
    ("output", "score"),
    [("1234567 and 7654321.", 1.0), ("it is 1234567", 0.5), ("123456", 0.0), ("", 0.0)],
)
def test_match_all_is_the_share_of_answers_said(output: str, score: float) -> None:
    assert METRICS["all"](output, example("1234567", "7654321")) == score


def test_case_and_line_breaks_do_not_matter() -> None:
    assert METRICS["all"]("Crimson\n harbor seven", example("crimson Harbor Seven")) == 1.0


@pytest.mark.parametrize(
    ("output", "score"),
    [("A", 1.0), (" a, of course", 1.0), ("B", 0.0), ("(A)", 1.0), ("Both", 0.0), ("", 0.0)],
)
def test_choice_takes_the_first_letter(output: str, score: float) -> None:
    assert METRICS["choice"](output, example("A")) == score


CANDIDATES = ("Ann Lee", "Bo May", "Cy Fox", "Ann Leeds")


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("Bo May, ann lee", 1.0),
        ("Ann Lee", 2 / 3),
        ("Ann Lee, Bo May, Cy Fox", 0.8),
        ("Ann Leeds", 0.0),
        ("Cy Fox", 0.0),
        ("", 0.0),
    ],
)
def test_f1_punishes_what_is_missing_and_what_is_wrong(output: str, score: float) -> None:
    asked = example("Ann Lee", "Bo May", candidates=CANDIDATES)
    assert METRICS["set_f1"](output, asked) == pytest.approx(score)


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("Ann Lee, Bo May, Cy Fox", 1.0),
        ("Ann Lee, Cy Fox, Bo May", 1 / 3),
        ("Cy Fox, Bo May, Ann Lee", 0.0),
        ("Ann Lee then Cy Fox", 2 / 3),
        ("Bo May", 1 / 3),
        ("nobody", 0.0),
    ],
)
def test_order_is_kendalls_tau_of_those_named(output: str, score: float) -> None:
    asked = example("Ann Lee", "Bo May", "Cy Fox", candidates=CANDIDATES)
    assert METRICS["order"](output, asked) == pytest.approx(score)
