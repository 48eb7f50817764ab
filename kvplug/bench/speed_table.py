"""Measured cells as a table for people: each time with its ratio, in as few columns as tell it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

Row = dict[str, Any]
Rows = list[Row]


def speed_table(title: str, names: Sequence[str], rows: Rows) -> Table:
    """Draws rows that have what :class:`kvplug.bench.job.Cell` has, and ratios.

    Args:
        title: Of the table.
        names: Keys that say what a row is, one column each.
        rows: At least one; a column that says nothing in any of them is left out.
    """
    columns: dict[str, Callable[[Row], str]] = {
        "tokens": lambda row: f"{row['context_tokens']:,}",
        "batch": lambda row: str(row["batch"]) if row["batch"] > 1 else "",
        "first\ntoken, s": lambda row: _with_ratio(row["ttft_s"], row["ttft_ratio"]),
        "decode,\ntok/s": lambda row: _with_ratio(row["decode_tok_s"], row["decode_ratio"]),
        "all\ndone, s": lambda row: _with_ratio(row["total_s"], row["total_ratio"]),
        "right": lambda row: _yes_no(row["correct"]),
        "same\ntokens": lambda row: _yes_no(row.get("same_tokens")),
        "needles": lambda row: f"{row['recalled']}/{row['needles']}" if row.get("needles") else "",
    }
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    told = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    told = {name: cells for name, cells in told.items() if any(cells)}
    for name in told:
        table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*(row[name] for name in names), *(cells[number] for cells in told.values()))
    return table


def _with_ratio(value: float, ratio: float | None) -> str:
    return f"{value:.3g}" if ratio is None else f"{value:.3g} {ratio:.3g}x"


def _yes_no(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"
