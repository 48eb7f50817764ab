"""Where commands write: results on stdout, everything else on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

out = Console()
err = Console(stderr=True)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr; the function it gives changes the text."""
    with err.status("starting") as status:

        def say(text: str) -> None:
            status.update(escape(text))
            if not err.is_terminal:
                err.print(escape(text), highlight=False, soft_wrap=True)

        yield say
