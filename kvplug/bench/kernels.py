"""``kvplug bench kernels``: the Triton kernels checked, timed on a GPU, or verified without one.

``python -m kvplug.bench.kernels`` takes the same options and needs neither vLLM nor pydantic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvplug.bench.kernel_document import Document, merged, show, write
from kvplug.bench.kernel_sections import Plan, Say, compiled, interpreted, measured
from kvplug.errors import KvplugError
from kvplug.options import JsonFlag


def command(
    progress: Callable[[], AbstractContextManager[Say]], out: Console,
    numbers: Callable[[str], list[int]],
) -> Any:  # fmt: skip
    """The command's function, for typer.

    Args:
        progress: Opens a spinner and gives what changes its text.
        out: Where results go.
        numbers: Reads whole numbers with commas.
    """

    def kernels(
        contexts: Annotated[str, typer.Option(help="Tokens, with commas.")] = (
            "8192,32768,131072,524288"
        ),
        batches: Annotated[str, typer.Option(help="Requests at once, with commas.")] = "1,8,32",
        budgets: Annotated[
            str, typer.Option(help="Far tokens per request and KV head, with commas.")
        ] = "1024,2048",
        repeats: Annotated[int, typer.Option(min=1, help="Medians are of this many.")] = 21,
        interpret: Annotated[
            bool, typer.Option("--interpret", help="Verify in Triton's interpreter; no GPU needed.")
        ] = False,
        compile_: Annotated[
            bool, typer.Option("--compile", help="Compile for sm_80, sm_90, gfx942; likewise.")
        ] = False,
        path: Annotated[
            Path | None,
            typer.Option("--write", help="Markdown page to write; figures go beside it, as .json."),
        ] = None,
        as_json: JsonFlag = False,
    ) -> None:
        """Check the Triton kernels, and time them and the decode attention step on a GPU."""
        plan = Plan(numbers(contexts), numbers(batches), numbers(budgets), repeats)
        document: Document = {}
        if path is not None:
            merged(document, path)  # refuses before anything is measured
        with progress() as say:
            if interpret:
                say("verifying in Triton's interpreter")
                document["interpreted"] = interpreted()
            if compile_:
                say("compiling")
                document["compiled"] = compiled()
            if not interpret and not compile_:

                def keep(section: Document) -> None:
                    if path is not None:
                        write({"measured": section}, path)

                document["measured"] = measured(plan, say, keep)
        if path is not None:
            write(document, path)
        if as_json:
            print(json.dumps(document))
        else:
            show(document, out)

    return kernels


def main() -> None:
    """Runs the command where the rest of kvplug's command line cannot be imported."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    try:
        typer.run(command(lambda: nullcontext(say), Console(), numbers))
    except KvplugError as error:
        say(f"error: {error}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
