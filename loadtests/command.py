"""The command ``kvplug load``. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kvplug.config import DEFAULT_POLICY
from kvplug.errors import KvplugError
from kvplug.options import ChunkOption, EagerOption, JsonFlag, PageOption, Progress, group_of

if TYPE_CHECKING:
    from kvplug.loadtests.contenders import Contender
    from kvplug.loadtests.report import Report
    from kvplug.loadtests.settings import Settings

FAILED, NOT_BELIEVABLE, PARTIAL = 1, 3, 4
"""Exit codes; 2 is a user's error, as everywhere."""
ProcessesOption = Annotated[int, typer.Option(help="Client processes.")]
SeedOption = Annotated[int, typer.Option(help="Of everything that is drawn.")]


def load_app(progress: Progress, out: Console) -> typer.Typer:
    """The commands, for typer.

    Args:
        progress: Opens a spinner and gives what changes its text.
        out: Where results go.
    """
    app = typer.Typer(
        cls=group_of("run"), help="Load tests; without a COMMAND: run, by its options."
    )

    @app.command()
    def run(
        compare: Annotated[
            str, typer.Option(help="Servers to start, with commas: dense (stock vLLM), recipes.")
        ] = f"dense,{DEFAULT_POLICY}",
        url: Annotated[
            list[str] | None,
            typer.Option(help="A server that runs already, [LABEL=]URL, instead; may repeat."),
        ] = None,
        redraw: Annotated[
            Path | None, typer.Option("--from", help="Folder to draw again instead of measuring.")
        ] = None,
        folder: Annotated[Path, typer.Option("--out", help="New folder for results.")] = Path(
            "out/load"
        ),
        vllm_bench: Annotated[
            list[Path] | None,
            typer.Option(help="JSON of `vllm bench serve` to draw beside; may repeat."),
        ] = None,
        model: Annotated[str, typer.Option(help="recall, trained, random, or a path.")] = "recall",
        loop: Annotated[
            str,
            typer.Option(
                help="closed: a user waits for its answer. open: requests go out when due."
            ),
        ] = "closed",
        arrivals: Annotated[
            str, typer.Option(help="Of an open loop: poisson or constant.")
        ] = "poisson",
        shape: Annotated[
            str, typer.Option(help="constant, ramp, step, burst or sweep.")
        ] = "constant",
        levels: Annotated[
            str, typer.Option(help="Users, or requests per second of an open loop, with commas.")
        ] = "2",
        seconds: Annotated[
            float, typer.Option(help="Of the shape; of every level of a sweep.")
        ] = 600.0,
        requests: Annotated[int, typer.Option(help="Sessions at most, per level of a sweep.")] = 20,
        workload: Annotated[
            str, typer.Option(help="needles, shared-prefix, multi-turn or mixed.")
        ] = "needles",
        lengths: Annotated[
            str, typer.Option(help="Prompt tokens: fixed:N, uniform:A-B, lognormal:MEDIAN,S,MAX.")
        ] = "fixed:32768",
        short_lengths: Annotated[
            str, typer.Option(help="Of the short requests of mixed.")
        ] = "uniform:256-1024",
        short_share: Annotated[float, typer.Option(help="Of requests of mixed.")] = 0.5,
        documents: Annotated[int, typer.Option(help="Different prefixes of shared-prefix.")] = 1,
        turns: Annotated[int, typer.Option(help="Of a conversation of multi-turn.")] = 4,
        pause: Annotated[float, typer.Option(help="Mean seconds between its turns.")] = 1.0,
        output_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 32,
        ignore_eos: Annotated[
            bool, typer.Option("--ignore-eos", help="Answers have exactly that many tokens.")
        ] = False,
        seed: SeedOption = 0,
        processes: ProcessesOption = 1,
        slo: Annotated[
            str, typer.Option(help="Limits of a good request in seconds: ttft=2,gap=0.1,e2e=30.")
        ] = "",
        slo_share: Annotated[
            float, typer.Option(help="Of requests that must be good to sustain a load.")
        ] = 0.95,
        timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 600.0,
        most_in_flight: Annotated[
            int, typer.Option(help="Requests of a client process at once.")
        ] = 1024,
        most_minutes: Annotated[float, typer.Option(help="For one server.")] = 30.0,
        warmups: Annotated[int, typer.Option(help="Requests before those that count.")] = 1,
        scrape: Annotated[float, typer.Option(help="Seconds between looks at /metrics.")] = 2.0,
        budget: Annotated[int, typer.Option(help="Far tokens per window and KV head.")] = 512,
        page: PageOption = 32,
        chunk: ChunkOption = 4096,
        eager: EagerOption = False,
        flags: Annotated[str, typer.Option(help="Other flags of every server.")] = "",
        key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="For --url.")] = "",
        as_json: JsonFlag = False,
    ) -> None:
        """Put servers under the same load, one after the other, and say what the numbers are."""
        from kvplug.loadtests.contenders import Serving, running, started
        from kvplug.loadtests.settings import Settings
        from kvplug.loadtests.slo import parse_slo
        from kvplug.loadtests.vllm_bench import read

        foreign = [read(path) for path in vllm_bench or ()]
        if redraw is not None:
            finish(redraw, foreign, out, as_json)
            return
        settings = Settings(
            loop, arrivals, shape, levels_of(levels), seconds, requests, workload, lengths,
            short_lengths, short_share, documents, turns, pause, output_tokens, ignore_eos, seed,
            processes, timeout, most_in_flight, 60 * most_minutes, warmups, scrape,
        )  # fmt: skip
        limits = parse_slo(slo, slo_share)
        if url:
            contenders = running(url)
        else:
            serving = Serving(model, budget, page, chunk, eager, shlex.split(flags))
            contenders = started([n for n in compare.split(",") if n], settings, serving)
        with progress() as say:
            measure(settings, limits, contenders, folder, key, say)
        finish(folder, foreign, out, as_json)

    @app.command()
    def calibrate(
        streams: Annotated[int, typer.Option(help="At once.")] = 20,
        processes: ProcessesOption = 1,
        seed: SeedOption = 0,
        as_json: JsonFlag = False,
    ) -> None:
        """Say what the client itself adds to a first token and to a gap."""
        from kvplug.loadtests.calibrate import LIMIT_S, calibrate
        from kvplug.loadtests.calibrate import as_json as told_of

        with progress() as say:
            found = calibrate(streams, processes, seed, say)
        if as_json:
            print(json.dumps(told_of(found)))
        else:
            table = Table(title=f"{streams} streams, {processes} processes, {found.requests} "
                          "requests of known delays")  # fmt: skip
            for column in ("what", "median", "95%", "worst"):
                table.add_column(column, justify="left" if column == "what" else "right")
            table.add_row("error of first tokens", *map(_ms, (found.ttft_p50, found.ttft_p95,
                                                              found.ttft_max)))  # fmt: skip
            table.add_row("error of gaps", _ms(found.gap_p50), _ms(found.gap_p95), "")
            table.add_row("of it: the fake server's lateness", _ms(found.late_p50), "",
                          _ms(found.late_max))  # fmt: skip
            out.print(table)
            verdict = "believable" if found.is_believable else "not believable"
            out.print(
                f"The client is {verdict}: 95% of first tokens must be within {_ms(LIMIT_S)}. "
                f"It took {found.cpu:.0%} of a core.",
                highlight=False,
            )
        raise typer.Exit(0 if found.is_believable else NOT_BELIEVABLE)

    return app


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def levels_of(text: str) -> tuple[float, ...]:
    """Numbers with commas between them.

    Raises:
        KvplugError: They are not.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise KvplugError(f"--levels {text!r} must be numbers with commas between them.") from None


def measure(
    settings: Settings, slo: Any, contenders: list[Contender], path: Path, key: str,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Runs a load test into a new folder.

    Args:
        settings: What is asked for.
        slo: Limits of a good request.
        contenders: Servers.
        path: The folder.
        key: API key.
        say: Told what is going on.

    Raises:
        KvplugError: There are no servers, locust is missing, or nothing could be measured.
    """
    from importlib.util import find_spec

    from kvplug.loadtests.environment import environment
    from kvplug.loadtests.folder import Folder, Run
    from kvplug.loadtests.run import run as ask
    from kvplug.models.tokenizer import build_tokenizer

    if not contenders:
        raise KvplugError("Name servers to start with --compare, or running ones with --url.")
    if find_spec("locust") is None:
        raise KvplugError("Load tests need locust: pip install 'kvplug[loadtest]'.")
    labels = [contender.label for contender in contenders]
    made_by = shlex.join(["kvplug", *sys.argv[1:]])
    run, folder = Run(settings, slo, labels, environment(contenders, made_by)), Folder(path)
    folder.create(run)
    with ended_politely():
        ask(run, contenders, folder, build_tokenizer(), key, say)


@contextmanager
def ended_politely() -> Iterator[None]:
    """Takes the signal to terminate as Ctrl-C: servers are ended, and what there is is kept."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def finish(path: Path, foreign: list[Any], out: Console, as_json: bool) -> None:
    """Writes and tells a folder's report.

    Raises:
        typer.Exit: Something is wrong; the code says what.
    """
    from kvplug.loadtests.folder import Folder
    from kvplug.loadtests.outputs import cases, write_all

    report = write_all(Folder(path), foreign)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        show(report, path, out)
    if not report.is_believable:
        raise typer.Exit(NOT_BELIEVABLE)
    if report.run.is_partial:
        raise typer.Exit(PARTIAL)
    if any(case.problem for case in cases(report)):
        raise typer.Exit(FAILED)


def show(report: Report, path: Path, out: Console) -> None:
    """Prints one row a server, and where the rest is."""
    from kvplug.loadtests.page import digits, interval

    title = "kvplug load, medians; 95% intervals in brackets"
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("server", "asked", "failed", "right", "output\ntok/s", "first token",
                   "gaps,\nms", "good,\n%"):  # fmt: skip
        table.add_column(column, justify="left" if column == "server" else "right", no_wrap=True)
    for s in report.whole():
        table.add_row(
            s.setup, str(s.requests), str(sum(s.errors.values())), f"{s.right}/{s.checked}",
            digits(s.output_tok_s), interval(s.ttft.get("p50"), 1, " s"),
            *(digits(scale * part.value) if part else "-"
              for part, scale in ((s.gap.get("p50"), 1000), (s.good, 100))),
        )  # fmt: skip
    out.print(table)
    for pair in report.pairs:
        out.print(
            f"{pair.setup} over {pair.base}: first token {interval(pair.ttft, 1, 'x')} sooner, "
            f"output {pair.output_ratio or 0:.2f}x; {pair.right} right, {pair.base_right} there.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    for name, why in report.run.troubles.items():
        out.print(f"partial: {name or 'run'}: {why}", highlight=False, soft_wrap=True, markup=False)
    for check in report.checks:
        if not check.is_fine:
            out.print(f"not believable: {check.setup or 'client'}: {check.name}: {check.found}, "
                      f"should be {check.limit}", highlight=False, soft_wrap=True)  # fmt: skip
    out.print(f"{path}/report.html", highlight=False, soft_wrap=True)
