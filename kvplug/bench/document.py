"""The document of ``kvplug bench recipes``: made, kept as JSON, read back, shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kvplug.bench.page import COLUMNS, cells, draw
from kvplug.bench.sweep import LONG, MASS_STEPS
from kvplug.bench.table import Plan, Row, measure
from kvplug.errors import KvplugError
from kvplug.machine import num_threads, processor, versions

Document = dict[str, Any]
"""``command``, ``processor``, ``threads``, ``versions``, ``model``, ``settings``, ``recipes``
(``label``, ``options``, ``why``), ``rows`` and ``failures`` (label -> reason)."""


def measured(plan: Plan, command: str, path: Path | None, say: Callable[[str], None]) -> Document:
    """Measures a table, and writes what there is after every engine.

    Args:
        plan: What the table holds.
        command: The command line that asked for it.
        path: Of the Markdown page; None writes nothing.
        say: Told of each finished cell.

    Raises:
        KvplugError: Stock vLLM failed, or the page cannot be written; said before measuring.
    """
    document = _header(plan, command)
    if path is not None:
        _check_writable(path)

    def keep(rows: list[Row], failures: dict[str, str]) -> None:
        document.update(rows=rows, failures=failures)
        if path is not None:
            write(document, path)

    measure(plan, say, keep)
    return document


def _header(plan: Plan, command: str) -> Document:
    job = plan.job
    return {
        "command": command,
        "processor": processor(),
        "threads": num_threads(),
        "versions": versions(),
        "model": job.model,
        "settings": {
            "page": job.page, "chunk": job.chunk, "decoded": job.decoded, "eager": job.eager,
            "repeats": job.repeats, "dense_repeats": plan.dense_repeats, "long": LONG,
            "mass_questions": plan.mass_questions, "mass_steps": MASS_STEPS,
        },
        "recipes": [recipe._asdict() for recipe in plan.recipes],
        "rows": [],
        "failures": {},
    }  # fmt: skip


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise KvplugError(f"--write {path} cannot be written: {error.strerror}.") from None


def write(document: Document, path: Path) -> None:
    """Writes the Markdown page, and the document beside it as JSON."""
    path.write_text(draw(document))
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


def read(path: Path) -> Document:
    """A document that :func:`write` wrote.

    Raises:
        KvplugError: It is something else.
    """
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise KvplugError(f"--from {path} cannot be read: {error.strerror}.") from None
    except ValueError:
        document = None
    if not isinstance(document, dict) or "rows" not in document or "settings" not in document:
        raise KvplugError(f"--from {path} must be the JSON that `kvplug bench recipes` wrote.")
    return document


def show(document: Document, path: Path | None, as_json: bool, out: Console) -> None:
    """Prints the document, after writing it where that is wanted."""
    if path is not None:
        write(document, path)
    if as_json:
        print(json.dumps(document))
        return
    for context in dict.fromkeys(row["context_tokens"] for row in document["rows"]):
        title = f"{document['model']}, {context:,} tokens"
        table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for row in document["rows"]:
            if row["context_tokens"] == context:
                table.add_row(*(cell.replace("`", "") for cell in cells(row)))
        out.print(table)


def check_complete(document: Document) -> None:
    """Ends a run whose table has gaps.

    Raises:
        KvplugError: An engine failed; the reason is its own.
    """
    if document["failures"]:
        label, reason = next(iter(document["failures"].items()))
        others = len(document["failures"]) - 1
        more = f" ({others} more failed)" if others else ""
        raise KvplugError(f"{label}: {reason}{more}")
