"""The fake server reads its prompts; what it does with time is tested through the client."""

from __future__ import annotations

import pytest

from kvplug.loadtests.fake_server import Fake, answer, metrics
from kvplug.loadtests.scrape import values_of


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["The key of the inn is red. What is the key of the inn?"], "red."),
        (["A KEY is Six Words. x. What is b? What is a key?"], "Six Words."),
        (["The key is red.", "red.", "What is the key?"], "red."),
        (["What is this?"], "nobody knows."),
        (["Say something."], "there was no question."),
    ],
)
def test_answers(texts: list[str], said: str) -> None:
    assert answer([{"role": "user", "content": text} for text in texts]) == said


def test_metrics_can_be_read() -> None:
    values = values_of(metrics(Fake(running=3, lates=[0.003, 0.001, 0.002])))
    assert values["vllm:num_requests_running"] == 3
    assert values["kvplug:fake_late_p50_seconds"] == 0.002
    assert values["kvplug:fake_late_max_seconds"] == 0.003
