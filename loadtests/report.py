"""Everything that a load test says, computed from what is in its folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvplug.loadtests.arrivals import arrivals
from kvplug.loadtests.folder import Run
from kvplug.loadtests.knee import Knee, Level, knee
from kvplug.loadtests.pairs import Pair, pair
from kvplug.loadtests.records import Record
from kvplug.loadtests.settings import Settings
from kvplug.loadtests.summary import ALL, Summary, summarise
from kvplug.loadtests.trust import Check, checks
from kvplug.loadtests.vllm_bench import Foreign

SCHEMA = "kvplug-load/1"


@dataclass(frozen=True)
class Report:
    """What there is to say."""

    run: Run
    checks: list[Check]
    summaries: list[Summary]
    """Of every server, then of its loads, then of its kinds of requests."""
    pairs: list[Pair]
    knees: dict[str, Knee]
    """Label -> knee, of a sweep."""
    foreign: list[Foreign]

    @property
    def is_believable(self) -> bool:
        """Whether the client was good enough to measure this."""
        return all(check.is_fine for check in self.checks)

    def whole(self) -> list[Summary]:
        """One summary a server."""
        return [summary for summary in self.summaries if summary.scope == ALL]

    def to_json(self) -> dict[str, Any]:
        """As ``report.json`` has it; numbers that JSON cannot say are null."""
        told: dict[str, Any] = _sayable({
            "schema": SCHEMA, "believable": self.is_believable, "partial": self.run.is_partial,
            **asdict(self), "knees": {name: found._asdict() for name, found in self.knees.items()},
        })  # fmt: skip
        return told


def _sayable(value: Any) -> Any:
    """Without infinities, and with the ends of intervals named."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _sayable(part) for key, part in value.items()}
    if hasattr(value, "_asdict"):
        return _sayable(value._asdict())
    if isinstance(value, list | tuple):
        return [_sayable(part) for part in value]
    return value


def build(
    run: Run, records: Sequence[Record], samples: Sequence[dict[str, Any]],
    foreign: Sequence[Foreign],
) -> Report:  # fmt: skip
    """Computes a report.

    Args:
        run: What was asked for.
        records: Every request.
        samples: What was sampled beside them.
        foreign: Results of other tools.
    """
    by_setup = {s: [r for r in records if r.setup == s] for s in run.setups}
    by_setup = {setup: mine for setup, mine in by_setup.items() if mine}
    whole = {s: summarise(s, ALL, mine, run.slo) for s, mine in by_setup.items()}
    parts = [part for s, mine in by_setup.items() for part in _parts(run, s, mine)]
    base, *others = run.setups
    pairs = [
        pair(by_setup[base], by_setup[s], whole[base].output_tok_s, whole[s].output_tok_s)
        for s in others
        if base in whole and s in whole
    ]
    return Report(
        run, checks(run.calibration, run.setups, records, samples, planned(run.settings)),
        [*whole.values(), *parts], [found for found in pairs if found is not None],
        {s: _knee(run, mine) for s, mine in by_setup.items()}
        if run.settings.shape == "sweep" else {},
        list(foreign),
    )  # fmt: skip


def planned(settings: Settings) -> int:
    """Sessions of an open loop; 0 for a closed one."""
    if settings.loop == "closed":
        return 0
    return sum(
        len(arrivals(phase, settings.process, f"arrivals {settings.seed} {i}", settings.requests))
        for i, phase in enumerate(settings.phases())
    )


def _parts(run: Run, setup: str, records: Sequence[Record]) -> list[Summary]:
    """Summaries by load and by kind, where there is more than one."""
    groups: dict[str, list[Record]] = {}
    shaped = run.settings.phases()
    unit = "users" if run.settings.loop == "closed" else "per s"
    for record in records:
        phase = shaped[record.phase]
        # Later turns of a conversation may begin after the phase: they count to its last load.
        at = min(max(record.intended, 0.0), phase.seconds * (1 - 1e-9))
        load = f"{phase.level(at):g} {unit}"
        if run.settings.shape in ("sweep", "step", "burst"):
            groups.setdefault(f"load {load}", []).append(record)
    kinds = dict.fromkeys(record.kind for record in records)
    for kind in kinds if len(kinds) > 1 else ():
        groups[kind] = [record for record in records if record.kind == kind]
    return [summarise(setup, scope, mine, run.slo) for scope, mine in groups.items()]


def _knee(run: Run, records: Sequence[Record]) -> Knee:
    """The knee of one server's sweep."""
    levels = []
    for number, phase in enumerate(run.settings.phases()):
        good = [run.slo.is_good(record) for record in records if record.phase == number]
        if good:
            levels.append(Level(phase.peak, good))
    return knee(levels, run.slo.share)
