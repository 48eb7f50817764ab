"""Runs a load test: the same sessions at the same times for one server after the other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvplug.errors import KvplugError
from kvplug.loadtests.arrivals import arrivals
from kvplug.loadtests.calibrate import STREAMS, calibrate
from kvplug.loadtests.client import Reply, StreamClient, clock
from kvplug.loadtests.clients import Task, client_processes
from kvplug.loadtests.contenders import Contender, Ready
from kvplug.loadtests.folder import Folder, Run
from kvplug.loadtests.lengths import Lengths, parse_lengths
from kvplug.loadtests.others import share_of_others, spent
from kvplug.loadtests.records import Appender
from kvplug.loadtests.scrape import Sampler
from kvplug.loadtests.settings import Settings
from kvplug.loadtests.shapes import Phase
from kvplug.loadtests.workloads import WORKLOADS
from kvplug.loadtests.workloads.base import Materials, needle_turn, sessions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]
FIRST_WARMUP = 10_000_000
"""Number of the first warm-up: its document is in no measured session."""
INTERRUPTED = "the run was interrupted"


@dataclass(frozen=True)
class Prepared:
    """A phase with what is asked in it."""

    number: int
    phase: Phase
    arrivals: list[float]
    path: Path
    """Its sessions, one a line."""


def materials_of(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Materials:
    """What the settings' sessions are made of."""
    return Materials(
        tokenizer, parse_lengths(settings.lengths), parse_lengths(settings.short_lengths),
        settings.short_share, settings.documents, settings.turns, settings.pause_s, settings.seed,
    )  # fmt: skip


def prepare(settings: Settings, materials: Materials, folder: Path, say: Say) -> list[Prepared]:
    """Draws every phase's arrivals and sessions, before anything is measured.

    Args:
        settings: What is drawn.
        materials: Of the sessions.
        folder: Takes the sessions.
        say: Told of each phase.

    Raises:
        KvplugError: Documents too short for their questions.
    """
    workload, first, found = WORKLOADS.get(settings.workload), 0, []
    for number, phase in enumerate(settings.phases()):
        times: list[float] = []
        count = settings.requests
        if settings.loop == "open":
            seed = f"arrivals {settings.seed} {number}"
            times = arrivals(phase, settings.process, seed, settings.requests)
            count = len(times)
        say(f"writing {count} sessions at load {phase.name}")
        path = folder / f"sessions-{number}.jsonl"
        try:
            with path.open("w") as file:
                for session in sessions(workload, materials, first, count):
                    file.write(json.dumps(session) + "\n")
        except ValueError as error:
            raise KvplugError(f"The workload's documents cannot be made: {error}.") from None
        found.append(Prepared(number, phase, times, path))
        first += count
    return found


def run(
    run: Run, contenders: Sequence[Contender], folder: Folder, tokenizer: PreTrainedTokenizerBase,
    key: str, say: Say,
) -> None:  # fmt: skip
    """Asks every server everything; whatever happens, what was measured is in the folder.

    A server that fails does not cost the others their figures. ``run`` says in the end what is
    missing.

    Args:
        run: What to do; saved in the folder already.
        contenders: Servers.
        folder: Takes requests and samples.
        tokenizer: Of the documents.
        key: API key.
        say: Told what is going on.

    Raises:
        KvplugError: The client cannot be calibrated, or sessions not be made.
    """
    materials = materials_of(run.settings, tokenizer)
    samples = folder.samples()
    try:
        with tempfile.TemporaryDirectory(prefix="kvplug-load-") as name:
            prepared = prepare(run.settings, materials, Path(name), say)
            run.calibration = calibrate(
                max(STREAMS, run.settings.processes), run.settings.processes, run.settings.seed, say
            )
            folder.save(run)
            for contender in contenders:
                say(f"{contender.label}: starting")
                reason = _ask(run, contender, prepared, materials, folder, samples, key, say)
                if reason is not None:
                    run.troubles[contender.label] = reason
                    say(f"{contender.label}: {reason}")
                folder.save(run)
        run.is_over = True
    except KeyboardInterrupt:
        run.troubles[""] = INTERRUPTED
    finally:
        samples.close()
        folder.save(run)


def _ask(
    run: Run, contender: Contender, prepared: list[Prepared], materials: Materials,
    folder: Folder, samples: Appender, key: str, say: Say,
) -> str | None:  # fmt: skip
    """Asks one server everything; why not all of it, or None."""
    settings, log = run.settings, folder.path / f"{contender.label}.log"
    try:
        with contender.ready(log, key) as server:
            _warm_up(settings, server, materials, key)
            until = clock() + settings.most_s

            def keep(at: float, values: dict[str, float]) -> None:
                samples.add({"kind": "server", "setup": contender.label, "clock": at, **values})

            with Sampler(server.url, settings.scrape_s, keep):
                for part in prepared:
                    say(f"{contender.label}: load {part.phase.name}")
                    where = {"setup": contender.label, "phase": part.number}
                    reason = _phase(settings, part, server, folder, samples, key, until, where)
                    if reason is not None:
                        return reason
    except KvplugError as error:
        return str(error)
    return None


def _phase(
    settings: Settings, part: Prepared, server: Ready, folder: Folder, samples: Appender,
    key: str, until: float, where: dict[str, Any],
) -> str | None:  # fmt: skip
    """One phase for one server; why it was broken off, or None."""
    if settings.loop == "open" and not part.arrivals:
        return None
    if clock() > until:
        return f"it took longer than the {settings.most_s / 60:g} minutes it may"
    common = {
        "url": server.url, "loop": settings.loop, "times": part.phase.times,
        "levels": part.phase.levels, "timeout_s": settings.timeout_s,
        "drain_s": settings.timeout_s * settings.turns + 3600, "sessions": str(part.path),
        "records": str(folder.requests_path), "samples": str(folder.samples_path),
        "most_in_flight": settings.most_in_flight, "common": settings.body(server.model), **where,
    }  # fmt: skip
    task = Task(common, settings.processes, part.arrivals)
    before = _lines(folder.requests_path)
    begun = None if server.pid is None else spent(server.pid)
    with client_processes(task, key) as clients:
        zero = clients.start()
        samples.add({"kind": "phase", **where, "clock": zero})
        reason = clients.wait(until, server.trouble)
    if begun is not None and server.pid is not None and server.trouble() is None:
        others = share_of_others(begun, spent(server.pid))
        samples.add({"kind": "machine", **where, "others": others})
    # A server that dies fails its last requests before anyone looks.
    return (
        reason
        or server.trouble()
        or ("nothing was asked" if _lines(folder.requests_path) == before else None)
    )


def _lines(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _warm_up(settings: Settings, server: Ready, materials: Materials, key: str) -> None:
    """Requests that do not count: compilation, and memory touched for the first time.

    Raises:
        KvplugError: One failed.
    """
    longest = Lengths("", settings.longest, settings.longest)
    client = StreamClient(server.url, key, settings.timeout_s)
    for number in range(settings.warmups):
        turn = needle_turn(materials, longest, FIRST_WARMUP + number, "warm-up")
        reply = Reply()
        body = {**settings.body(server.model), "messages": turn.messages}
        client.ask(json.dumps(body).encode(), reply)
        if reply.error is not None:
            raise KvplugError(f"The first request failed ({reply.error}): {reply.detail}")
