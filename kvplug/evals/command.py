"""The command ``kvplug eval``. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvplug.errors import KvplugError

if TYPE_CHECKING:
    from kvplug.evals.plan import Settings
    from kvplug.evals.run import Model
    from kvplug.evals.summary import Row

RECALL_TASKS = (
    "niah_single_1,niah_multikey_2,niah_multikey_3,niah_multivalue,niah_multiquery,vt,passkey,"
    "number_string,kv_retrieval,mqar,joint_recall,episodes"
)
Progress = Callable[[], AbstractContextManager[Callable[[str], None]]]


def command(progress: Progress, out: Console, numbers: Callable[[str], list[int]]) -> Any:
    """The command's function, for typer.

    Args:
        progress: Opens a spinner and gives what changes its text.
        out: Where results go.
        numbers: Reads whole numbers with commas.
    """

    def evaluate(
        model: Annotated[
            str, typer.Argument(help="A checkpoint, 'recall', or the URL of an OpenAI endpoint.")
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
        ] = "simhash",
        setup: Annotated[
            list[str] | None,
            typer.Option(help="A setup of your own, LABEL=OPTIONS, kvplug's options as JSON."),
        ] = None,
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
        page: Annotated[int, typer.Option(help="Tokens per page, for every engine.")] = 32,
        chunk: Annotated[int, typer.Option(help="Prompt tokens per step.")] = 4096,
        selector: Annotated[
            bool,
            typer.Option(
                "--selector",
                help="Measure what heads select, not answers: captured mass, best "
                "pages found, output error.",
            ),
        ] = False,
        eager: Annotated[bool, typer.Option("--eager", help="Without vLLM's compiler.")] = False,
        answers: Annotated[
            Path | None, typer.Option(help="File of answers, JSON lines; asked again, goes on.")
        ] = None,
        html: Annotated[Path | None, typer.Option(help="Page with plots to write.")] = None,
        write: Annotated[Path | None, typer.Option(help="Markdown page to write.")] = None,
        fail_under: Annotated[
            float, typer.Option(min=0, help="Exit 1 if a setup keeps less of dense accuracy.")
        ] = 0.0,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON last.")] = False,
    ) -> None:
        """Long-context tasks over policies, budgets and lengths: what does retrieval cost?"""
        from kvplug.evals import report
        from kvplug.evals.endpoint import Endpoint
        from kvplug.evals.files import add_file
        from kvplug.evals.local import LocalModel
        from kvplug.evals.plan import Job, Settings, Setup
        from kvplug.evals.records import Records
        from kvplug.evals.run import run, setups_of
        from kvplug.evals.summary import summarise
        from kvplug.machine import num_threads, processor, versions

        remote = model.startswith(("http://", "https://"))
        words = plain if plain is not None else model == "recall"
        settings = Settings(
            model,
            haystack,
            words,
            page,
            chunk,
            eager,
            selector,
            "" if remote else processor(),
            0 if remote else num_threads(),
            {} if remote else versions(),
        )
        setups = (
            [Setup(label, label)]
            if remote
            else setups_of(policies.split(","), numbers(budgets), own_setups(setup or []))
        )
        if selector:
            setups = [setup for setup in setups if setup.budget is not None]
        if not setups:
            raise KvplugError("--selector measures recipes on a checkpoint; none is named.")
        names = chosen_tasks(tasks) if tasks else []
        names += [add_file(path) for path in file or ()]
        job = Job(settings, setups, names, sorted(numbers(contexts)), examples)
        records = Records(answers, settings)
        with progress() as say:
            answering: Model = Endpoint(settings, timeout, key) if remote else LocalModel(settings)
            run(job, answering, records, say)
        asked = set(job.questions())
        given = [answer for answer in records.answers.values() if answer.question in asked]
        rows = summarise(given, setups, page)
        if html is not None:
            save(html, report.page(settings, rows, given))
        if write is not None:
            save(write, report.document(settings, rows, shlex.join(["kvplug", *sys.argv[1:]])))
        show(out, settings, rows, as_json)
        worst = lowest(rows)
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


def show(out: Console, settings: Settings, rows: list[Row], as_json: bool) -> None:
    """Prints a table, or JSON."""
    from kvplug.evals import report

    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    table = Table(title=f"kvplug eval {settings.model}")
    for column in report.columns(settings):
        table.add_column(column)
    for row in rows:
        table.add_row(*report.cells(row))
    out.print(table)
