"""Tasks by name."""

from __future__ import annotations

from kvplug.evals.tasks.associative import JointRecall, MultiQueryRecall
from kvplug.evals.tasks.base import Task
from kvplug.evals.tasks.counting import CommonWords, FrequentWords
from kvplug.evals.tasks.episodes import Chronology, CueRecall
from kvplug.evals.tasks.needles import (
    ManyNumberKeys,
    ManyQueries,
    ManyUuidKeys,
    ManyValues,
    SingleNeedle,
)
from kvplug.evals.tasks.order import SequenceOrder
from kvplug.evals.tasks.passkeys import KeyValues, NumberString, PassKey
from kvplug.evals.tasks.variables import VariableTracking
from kvplug.registry import Registry

TASKS: Registry[Task] = Registry("task")
for _task in (
    SingleNeedle, ManyNumberKeys, ManyUuidKeys, ManyValues, ManyQueries, VariableTracking,
    CommonWords, FrequentWords, PassKey, NumberString, KeyValues, MultiQueryRecall, JointRecall,
    SequenceOrder, CueRecall, Chronology,
):  # fmt: skip
    TASKS.register(_task.name)(_task())
