"""``docs/recipes.md``: a measured table as a Markdown page, with what it takes to read it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from kvplug.bench.job import STOCK

COLUMNS = (
    "recipe", "budget", "needles found", "captured mass", "best mass", "first token", "ratio",
    "decode", "ratio", "index B/token",
)  # fmt: skip
INTRODUCTION = """\
Every recipe on the same engine, prompts and flags, against stock vLLM in the same run. Written by

    {command}

on {threads} {cores} of {processor}; {versions}. `{model}` model{shape}; pages of {page}, \
{chunk} prompt tokens per step, {decoded} tokens decoded, one request at a time, vLLM's compiler \
{compiler}. First tokens are medians of {repeats} (stock vLLM: {dense_repeats}), from \
{long:,} tokens on of one; decode speeds are medians over steps."""
READING = """\
## How to read it

* **budget**: far tokens that a window of queries attends to per KV head, besides sinks and the \
local region; "any" where a recipe selects nothing, and so heeds none. Budget plus sink plus local \
is what papers often call the budget.
* **needles found**: passwords hidden evenly over one document of this length, each asked for by \
itself. Found means that the answer begins word for word as it should.
* **captured mass**: the share of exact attention that falls on the keys attended: softmax over \
all keys, in float32 from the cache, of the prompt's last token and up to {steps} decoded ones. \
Means over heads, tokens, {questions} questions and retrieving layers. An answer counts up to \
its first wrong word, after which it looks for something else.
* **best mass**: what the best choice of as many far pages, known only afterwards, would capture.
* **first token**, **decode**: seconds and tokens per second; their ratios say how many times \
faster than stock vLLM, so above 1 is faster.
* **index B/token**: what one layer remembers of a token besides its key and value, all KV heads. \
What all layers share counts by equal parts."""
RECALL_NOTE = """\
On the recall model, captured mass says little that needles do not. Its first layer attends by \
position to the last few tokens, which are local, and always captures everything. Its second \
attends to one key, the word behind the last place where the last words stood: 1 where that key's \
page is attended, 0 where it is not. The mean of both is 0.5 where nothing is found and 1 where \
everything is. Questions about the end of the document are answered by the local region alone."""


def draw(document: Mapping[str, Any]) -> str:
    """The page.

    Args:
        document: As ``kvplug bench recipes --json`` prints it.
    """
    rows = document["rows"]
    parts = ["# Recipes compared", INTRODUCTION.format(**_facts(document))]
    for context in dict.fromkeys(row["context_tokens"] for row in rows):
        here = [row for row in rows if row["context_tokens"] == context]
        parts += [f"## {context:,} tokens", _table(here)]
    if document["failures"]:
        parts += ["## What failed", _list(document["failures"].items())]
    named = [recipe for recipe in document["recipes"] if set(recipe["options"]) != {"policy"}]
    if named:
        parts += ["## Configurations", "Every other row has its recipe's defaults.", _named(named)]
    settings = document["settings"]
    parts.append(READING.format(steps=settings["mass_steps"], questions=settings["mass_questions"]))
    if document["model"] == "recall":
        parts.append(RECALL_NOTE)
    return "\n\n".join(parts) + "\n"


def _facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the introduction says of the run."""
    settings = document["settings"]
    shape = " (2 layers, 8/4 heads of 128, bf16)" if document["model"] == "recall" else ""
    return {
        **document,
        **settings,
        "cores": "core" if document["threads"] == 1 else "cores",
        "versions": ", ".join(f"{name} {v}" for name, v in document["versions"].items()),
        "shape": shape,
        "compiler": "off" if settings["eager"] else "on",
    }


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of one context."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells, under COLUMNS; empty where there is nothing to measure."""
    stock = row["recipe"] == STOCK
    budget = row["budget_tokens"]
    return [
        "stock vLLM" if stock else f"`{row['recipe']}`",
        "" if stock else "any" if budget is None else f"{budget:,}",
        "" if row["needles"] is None else f"{row['recalled']} of {row['needles']}",
        _share(row["mass"]),
        _share(row["best_mass"]),
        f"{row['ttft_s']:.2f} s",
        "1" if stock else f"{row['ttft_ratio']:.2f}x",
        f"{row['decode_tok_s']:.0f} tok/s",
        "1" if stock else f"{row['decode_ratio']:.2f}x",
        "" if row["index_bytes_per_token"] is None else f"{row['index_bytes_per_token']:.1f}",
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _list(items: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"* `{name}`: {text}" for name, text in items)


def _named(recipes: Iterable[Mapping[str, Any]]) -> str:
    """Configurations with their options and reasons."""
    return "\n".join(
        f"* `{recipe['label']}`: `{json.dumps(recipe['options'])}`"
        + (f". {recipe['why']}" if recipe["why"] else "")
        for recipe in recipes
    )
