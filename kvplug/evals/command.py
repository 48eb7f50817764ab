"""The command ``kvplug eval``. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.config import DEFAULT_POLICY
from kvplug.errors import KvplugError
from kvplug.options import ChunkOption, EagerOption, JsonFlag, PageOption, Progress

if TYPE_CHECKING:
    from kvplug.evals.lab import Result
    from kvplug.evals.summary import Row

MEASURED = "<!-- Measured: written by kvplug eval, words above this line are kept. -->"
RECALL_TASKS = (
    "niah_single_1,niah_multikey_2,niah_multikey_3,niah_multivalue,niah_multiquery,vt,passkey,"
    "number_string,kv_retrieval,mqar,joint_recall,episodes"
)


def command(progress: Progress, out: Console, numbers: Callable[[str], list[int]]) -> Any:
    """The command's function, for typer.

    Args:
        progress: Opens a spinner and gives what changes its text.
        out: Where results go.
        numbers: Reads whole numbers with commas.
    """

    def evaluate(
        models: Annotated[
            list[str],
            typer.Argument(
                metavar="MODEL...",
                help="A checkpoint, 'recall', 'trained', 'bundled' for both, or the URL of an "
                "OpenAI endpoint; several go one after the other.",
            ),
        ],
        tasks: Annotated[
            str,
            typer.Option(
                help="Tasks, with commas; 'recall': all that ask for facts; 'all'; '': none."
            ),
        ] = "recall",
        file: Annotated[
            list[Path] | None,
            typer.Option(help="A file of LongBench or InfiniteBench; as often as you like."),
        ] = None,
        policies: Annotated[
            str, typer.Option(help="Recipes or own setups; stock vLLM is always asked.")
        ] = DEFAULT_POLICY,
        setup: Annotated[
            list[str] | None,
            typer.Option(help="A setup of your own, LABEL=OPTIONS, kvplug's options as JSON."),
        ] = None,
        peers: Annotated[
            str,
            typer.Option(
                help="Methods of kvpress to compare with, with commas: snapkv, tova, "
                "expected_attention, knorm."
            ),
        ] = "",
        budgets: Annotated[
            str, typer.Option(help="Far tokens per window and KV head, with commas.")
        ] = "512,1024",
        contexts: Annotated[str, typer.Option(help="Tokens, with commas.")] = "8192,32768",
        examples: Annotated[int, typer.Option(min=1, help="Questions per task and length.")] = 10,
        haystack: Annotated[
            str, typer.Option(help="Text between facts: prose, noise, or a directory of files.")
        ] = "prose",
        plain: Annotated[
            bool | None,
            typer.Option(help="Keys and values in words only (default: for bundled models)."),
        ] = None,
        label: Annotated[str, typer.Option(help="What an endpoint is called.")] = "dense",
        timeout: Annotated[float, typer.Option(min=1, help="Seconds an endpoint may take.")] = 600,
        key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="For an endpoint.")] = "-",
        page: PageOption = 32,
        chunk: ChunkOption = 4096,
        selector: Annotated[
            bool,
            typer.Option(
                "--selector",
                help="Measure what heads select, not answers: captured mass, best "
                "pages found, output error.",
            ),
        ] = False,
        eager: EagerOption = False,
        answers: Annotated[
            Path | None, typer.Option(help="File of answers, JSON lines; asked again, goes on.")
        ] = None,
        html: Annotated[Path | None, typer.Option(help="Page with plots to write.")] = None,
        write: Annotated[Path | None, typer.Option(help="Markdown page to write.")] = None,
        fail_under: Annotated[
            float, typer.Option(min=0, help="Exit 1 if a setup keeps less of dense accuracy.")
        ] = 0.0,
        as_json: JsonFlag = False,
    ) -> None:
        """Long-context tasks over policies, budgets and lengths: what does retrieval cost?"""
        from kvplug.evals import report
        from kvplug.evals.files import add_file
        from kvplug.evals.lab import Lab, answers_file, models_of
        from kvplug.evals.peers import setups_of_peers
        from kvplug.evals.run import setups_of

        names = chosen_tasks(tasks) if tasks else []
        names += [add_file(path) for path in file or ()]
        setups = setups_of(policies.split(","), numbers(budgets), own_setups(setup or []))
        setups += setups_of_peers([name for name in peers.split(",") if name], numbers(budgets))
        lab = Lab(
            setups, names, sorted(numbers(contexts)), examples, haystack, plain, page, chunk,
            eager, selector, label, timeout, key,
        )  # fmt: skip
        chosen = models_of(models)
        with progress() as say:
            results = [
                lab.run(model, answers_file(answers, model, chosen), say) for model in chosen
            ]
        if html is not None:
            save(html, report.page(results))
        if write is not None:
            write_document(write, results)
        show(out, results, as_json)
        worst = lowest([row for result in results for row in result.rows])
        if worst is not None and worst < fail_under:
            raise typer.Exit(1)

    return evaluate


def chosen_tasks(text: str) -> list[str]:
    """Names of tasks.

    Raises:
        KvplugError: One does not exist.
    """
    from kvplug.evals.tasks import TASKS

    sets = {"all": list(TASKS), "recall": RECALL_TASKS.split(",")}
    names = [name for part in text.split(",") for name in sets.get(part, [part])]
    for name in names:
        TASKS.get(name)
    return list(dict.fromkeys(names))


def own_setups(given: list[str]) -> dict[str, str]:
    """``LABEL=OPTIONS`` -> label and options.

    Raises:
        KvplugError: One is not of that form.
    """
    found = {}
    for text in given:
        label, equals, options = text.partition("=")
        if not label or not equals:
            raise KvplugError(f"--setup {text!r} must be LABEL=OPTIONS.")
        found[label] = options
    return found


def lowest(rows: list[Row]) -> float | None:
    """The least share of dense accuracy that a setup keeps on a task; None without dense."""
    kept = [row.kept.value for row in rows if row.kept is not None]
    return min(kept, default=None)


def save(path: Path, text: str) -> None:
    """Writes a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_document(path: Path, results: list[Result]) -> None:
    """Writes the Markdown page, and its plots into a folder beside it.

    What stands above the line :data:`MEASURED` in a page that is there already is kept: words that
    someone wrote about the figures.
    """
    from kvplug.evals import plots, report
    from kvplug.evals.lab import file_name

    pictures: dict[str, list[str]] = {}
    for result in results:
        if result.settings.selector:
            continue
        for name, draw in (("budget", plots.by_budget), ("pareto", plots.pareto)):
            picture = Path(path.stem) / f"{file_name(result.settings.model)}-{name}.svg"
            save(path.parent / picture, draw(result.rows))
            pictures.setdefault(result.settings.model, []).append(picture.as_posix())
    page = report.document(results, pictures, shlex.join(["kvplug", *sys.argv[1:]]))
    words, line, _ = path.read_text().partition(MEASURED) if path.exists() else ("", "", "")
    save(path, f"{words}{MEASURED}\n\n{page}" if line else page)


def show(out: Console, results: list[Result], as_json: bool) -> None:
    """Prints tables, or JSON."""
    from kvplug.evals import report

    if as_json:
        rows = [
            {"model": result.settings.model, **asdict(row)}
            for result in results
            for row in result.rows
        ]
        print(json.dumps(rows))
        return
    for result in results:
        table = Table(title=f"kvplug eval {result.settings.model}")
        for column in report.columns(result.settings):
            table.add_column(column)
        for row in result.rows:
            table.add_row(*report.cells(row))
        out.print(table)
