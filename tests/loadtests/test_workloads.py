"""Sessions come from seeds alone, hold their answers, and share what their names say they share."""

from __future__ import annotations

from typing import Any

import pytest

from kvplug.errors import KvplugError
from kvplug.loadtests.lengths import parse_lengths
from kvplug.loadtests.records import words
from kvplug.loadtests.workloads import WORKLOADS
from kvplug.loadtests.workloads.base import Materials, Session, sessions


def made(tokenizer: Any, workload: str, count: int = 6, **changed: Any) -> list[Session]:
    given = {
        "lengths": parse_lengths("uniform:400-900"), "short": parse_lengths("uniform:150-200"),
        "documents": 2, "turns": 3, "seed": 5, **changed,
    }  # fmt: skip
    return list(sessions(WORKLOADS.get(workload), Materials(tokenizer, **given), 0, count))


def document(session: Session) -> str:
    return session.turns[0].messages[0]["content"].split("\n\n")[0]


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_a_seed_gives_the_same_sessions_and_another_gives_others(
    tokenizer: Any, workload: str
) -> None:
    first = made(tokenizer, workload)
    assert made(tokenizer, workload) == first
    assert made(tokenizer, workload, seed=6) != first
    # A session depends on its number, not on those before it.
    materials = Materials(
        tokenizer, parse_lengths("uniform:400-900"), parse_lengths("uniform:150-200"),
        documents=2, turns=3, seed=5,
    )  # fmt: skip
    assert list(sessions(WORKLOADS.get(workload), materials, 4, 1)) == first[4:5]


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_every_answer_is_in_its_document(tokenizer: Any, workload: str) -> None:
    for session in made(tokenizer, workload):
        for turn in session.turns:
            key = turn.messages[-1]["content"].split("What is ")[-1].rstrip("?")
            assert words(f"{key} is {turn.expected}") in words(document(session))


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_prompts_have_the_length_that_was_drawn(tokenizer: Any, workload: str) -> None:
    for session in made(tokenizer, workload):
        turn = session.turns[0]
        text = tokenizer.apply_chat_template(
            turn.messages, tokenize=False, add_generation_prompt=True
        )
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == turn.context
        low, high = (150, 200) if turn.kind == "short" else (400, 900)
        # Questions about one document differ by the words of their places.
        assert low <= turn.context <= high + 4


def test_needles_share_nothing(tokenizer: Any) -> None:
    found = made(tokenizer, "needles")
    assert len({document(session) for session in found}) == len(found)


def test_a_shared_prefix_is_shared_in_turn(tokenizer: Any) -> None:
    found = made(tokenizer, "shared-prefix")
    assert [document(session) for session in found] == [
        document(found[i % 2]) for i in range(len(found))
    ]
    assert document(found[0]) != document(found[1])
    asked = [session.turns[0].messages[0]["content"] for session in found]
    assert len(set(asked)) == len(asked)


def test_a_conversation_grows(tokenizer: Any) -> None:
    for session in made(tokenizer, "multi-turn", pause_s=2.0):
        assert [turn.kind for turn in session.turns] == ["first turn", "later turn", "later turn"]
        assert len(session.pauses) == 2
        assert all(pause > 0 for pause in session.pauses)
        for before, after in zip(session.turns, session.turns[1:], strict=False):
            assert after.messages[: len(before.messages)] == before.messages
            assert after.messages[-2] == {"role": "assistant", "content": before.expected}
            assert after.messages[-1]["role"] == "user"


def test_no_pause_is_no_pause(tokenizer: Any) -> None:
    assert made(tokenizer, "multi-turn", count=1, pause_s=0.0)[0].pauses == [0.0, 0.0]


@pytest.mark.parametrize(("share", "kinds"), [(0.0, {"long"}), (1.0, {"short"})])
def test_mixed_at_its_ends(tokenizer: Any, share: float, kinds: set[str]) -> None:
    found = made(tokenizer, "mixed", short_share=share)
    assert {session.turns[0].kind for session in found} == kinds


def test_an_unknown_workload_is_refused() -> None:
    with pytest.raises(KvplugError, match="did you mean 'needles'"):
        WORKLOADS.get("needle")
