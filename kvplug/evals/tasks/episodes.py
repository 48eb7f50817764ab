"""Episodic memories (Huet et al. 2025, ICLR; github ahstat/episodic-memory-benchmark), by template.

An event has a date, a place, a person and a deed, each from a universe of 100 by a geometric
distribution, so that some come up often and most seldom. No two events share date and person, or
date and place. The benchmark has a language model write the chapters; here they are templates, and
answers are compared as sets, not by a judge.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

from kvplug.evals.tasks.base import Example, Materials, Task
from kvplug.models.words import word_sections

UNIVERSE = 100
SHARE = 0.1
"""Of the geometric distribution."""
SENTENCES = 4
"""Of filler after an event, in its chapter."""
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip


class Event(NamedTuple):
    """What happened in a chapter."""

    date: str
    place: str
    person: str
    deed: str

    def __str__(self) -> str:
        """The chapter's first sentence."""
        return f"On {self.date}, at the {self.place}, {self.person} {self.deed}."


def universes(draw: random.Random) -> Event:
    """A hundred of each coordinate, joined by ``|``: the most frequent first."""
    words = word_sections()
    days = [f"{day} {month} 2031" for month in MONTHS for day in range(1, 29)]
    places = [f"{a} {p}" for a, p in itertools.product(words["adjectives"][:20], words["places"])]
    people = [f"{a.capitalize()} {b.capitalize()}" for a, b in itertools.permutations(
        words["names"], 2)]  # fmt: skip
    deeds = [f"{v} the {n}" for v, n in itertools.product(
        words["transitive verbs"], words["nouns"][:40])]  # fmt: skip
    return Event(*("|".join(draw.sample(pool, UNIVERSE)) for pool in (days, places, people, deeds)))


def events(draw: random.Random, count: int) -> list[Event]:
    """``count`` events, in order of date."""
    pools = [coordinate.split("|") for coordinate in universes(draw)]
    weights = [(1 - SHARE) ** i for i in range(UNIVERSE)]
    found: list[Event] = []
    taken: set[tuple[str, str]] = set()
    while len(found) < count:
        event = Event(*(draw.choices(pool, weights)[0] for pool in pools))
        used = {(event.date, event.person), (event.date, event.place)}
        if not used & taken:
            taken |= used
            found.append(event)
    return found


class _Episodes(Task):
    source = "Episodic memories (Huet et al. 2025), from templates"
    max_tokens = 96
    smallest = 10

    def chapters(
        self, draw: random.Random, size: int, materials: Materials
    ) -> tuple[str, list[Event]]:
        """A book of ``size`` chapters, and what happened in each."""
        told = events(draw, size)
        filler = materials.text.sentences(draw, size * SENTENCES)
        parts = [
            f"Chapter {i + 1}. {event} {' '.join(filler[i * SENTENCES : (i + 1) * SENTENCES])}"
            for i, event in enumerate(told)
        ]
        return "\n".join(parts), told


class CueRecall(_Episodes):
    """``episodes``: who was at a place, or what did someone do there, over all chapters?

    The benchmark cues by any of its coordinates; these are its cue (place) for people and its cue
    (place, person) for deeds, in turns of a coin.
    """

    name = "episodes"
    metric = "set_f1"

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a chapter."""
        text, told = self.chapters(draw, size, materials)
        if draw.random() < 0.5:
            place = draw.choice(sorted({event.place for event in told}))
            found = [event.person for event in told if event.place == place]
            question = f"Which people did something at the {place}, in all chapters?"
            opening, candidates = f"At the {place},", [event.person for event in told]
        else:
            cue = draw.choice(told)
            found = [e.deed for e in told if (e.place, e.person) == (cue.place, cue.person)]
            question = f"What did {cue.person} do at the {cue.place}, in all chapters?"
            opening, candidates = f"At the {cue.place}, {cue.person}", [e.deed for e in told]
        answers, all_said = (tuple(dict.fromkeys(names)) for names in (found, candidates))
        return Example(text, question, opening, answers, None, all_said)


class Chronology(_Episodes):
    """``chronology``: where was a person, chapter by chapter?"""

    name = "chronology"
    metric = "order"

    def make(self, draw: random.Random, size: int, materials: Materials) -> Example:
        """See :meth:`Task.make`; a unit is a chapter."""
        text, told = self.chapters(draw, size, materials)
        by_person: dict[str, dict[str, None]] = {}
        for event in told:
            by_person.setdefault(event.person, {})[event.place] = None
        several = [person for person, places in by_person.items() if len(places) > 1]
        person = draw.choice(several or list(by_person))
        return Example(
            text,
            f"At which places was {person}, in the order of the chapters?",
            f"In this order, {person} was at the",
            tuple(by_person[person]),
            None,
            tuple(dict.fromkeys(event.place for event in told)),
        )
