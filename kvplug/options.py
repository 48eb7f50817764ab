"""Options, what reads them, and a kind of group, that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kvplug.errors import KvplugError

PageOption = Annotated[int, typer.Option(help="Tokens per page, for every engine.")]
ChunkOption = Annotated[int, typer.Option(help="Prompt tokens per step, for every engine.")]
EagerOption = Annotated[bool, typer.Option("--eager", help="Without vLLM's compiler.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object last on stdout.")]
Progress = Callable[[], AbstractContextManager[Callable[[str], None]]]
"""Opens a spinner and gives what changes its text."""


def group_of(default: str) -> type[TyperGroup]:
    """A group of commands that runs one of them where options stand without a command's name.

    Args:
        default: Its name.
    """

    class Group(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if not args or (args[0].startswith("-") and args[0] != "--help"):
                args = [default, *args]
            return super().parse_args(ctx, args)

    return Group


def numbers(text: str, least: int = 1) -> list[int]:
    """Integers from ``1,2,3``, positive unless zero is let in."""
    try:
        values = [int(part) for part in text.split(",") if part]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise KvplugError(f"{text!r} must be positive whole numbers with commas between them.")
    return values
