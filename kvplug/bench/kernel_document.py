"""The document of ``kvplug bench kernels``: kept as JSON beside its page, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kvplug.bench import kernel_page
from kvplug.errors import KvplugError

Document = dict[str, Any]
"""Sections by name; see :data:`kvplug.bench.kernel_page.Document`."""


def merged(document: Document, path: Path) -> Document:
    """The sections of a document, with those that a page has and this one lacks.

    Raises:
        KvplugError: What lies beside the page was written by something else.
    """
    beside = path.with_suffix(".json")
    if not beside.exists():
        return document
    try:
        old = json.loads(beside.read_text())
    except ValueError:
        old = None
    if not isinstance(old, dict) or not old.keys() <= {"measured", "interpreted", "compiled"}:
        raise KvplugError(f"{beside} must be JSON that `kvplug bench kernels` wrote, or be absent.")
    return {**old, **document}


def write(document: Document, path: Path) -> None:
    """Writes the page, and the document beside it as JSON.

    Raises:
        KvplugError: It cannot be written.
    """
    whole = merged(document, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(kernel_page.draw(whole))
        path.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    except OSError as error:
        raise KvplugError(f"--write {path} cannot be written: {error.strerror}.") from None


def show(document: Document, out: Console) -> None:
    """Prints what was found, as tables."""
    if "interpreted" in document:
        section = document["interpreted"]
        out.print(f"{section['checked']} checks in Triton's interpreter, all right.")
    if "compiled" in document:
        rows = document["compiled"]["rows"]
        spilled = sum(taken["spilled"] > 0 for row in rows for taken in row["targets"].values())
        out.print(
            f"{len(rows)} variants compile for {', '.join(rows[0]['targets'])}; registers are "
            f"spilled in {spilled} of {len(rows) * len(rows[0]['targets'])}."
        )
    if "measured" in document:
        section = document["measured"]
        _print_table(out, section["device"], kernel_page.KERNEL_COLUMNS,
                     map(kernel_page.kernel_cells, section["kernels"]))  # fmt: skip
        _print_table(out, "decode attention step", kernel_page.STEP_COLUMNS,
                     map(kernel_page.step_cells, section["steps"]))  # fmt: skip


def _print_table(out: Console, title: str, columns: Any, rows: Any) -> None:
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for cells in rows:
        table.add_row(*(cell.replace("`", "") for cell in cells))
    out.print(table)
