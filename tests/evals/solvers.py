"""Solves every task by reading its prompt: no seed, no generator, only text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import groupby

from kvplug.evals.tasks.base import Example

NEEDLE = re.compile(r"One of the special magic \w+ for ([^:]+?) is: ([^.]+)\.")


def needles(example: Example) -> str:
    """Values of the keys that the question names."""
    asked = example.question.split(" for ", 1)[1].rsplit(" in the text", 1)[0]
    keys = re.split(r", | and ", asked)
    return " ".join(value for key, value in NEEDLE.findall(example.document) if key in keys)


def variables(example: Example) -> str:
    """Names that hold the value, assignment by assignment."""
    value = re.search(r"\d{5}", example.question)
    assert value is not None
    holds: dict[str, str] = {}
    for name, what in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", example.document):
        holds[name] = holds.get(what, what)
    return " ".join(name for name, held in holds.items() if held == value.group())


def common(example: Example) -> str:
    """The ten words that are counted most often."""
    counts = Counter(re.findall(r"\d+\. (\w+(?:-\w+)?)", example.document))
    return " ".join(word for word, _ in counts.most_common(10))


def frequent(example: Example) -> str:
    """The three codes that are counted most often."""
    counts = Counter(re.findall(r"\b[a-z]{6}\b", example.document.split("\n", 1)[1]))
    return " ".join(word for word, _ in counts.most_common(3))


def said(pattern: str) -> Callable[[Example], str]:
    """What the document says in one place."""

    def solve(example: Example) -> str:
        found = re.search(pattern, example.document)
        assert found is not None
        return found.group(1)

    return solve


def key_values(example: Example) -> str:
    """The value in the JSON object, which plain wording writes without quotes."""
    said = example.document.split("\n", 1)[1]
    if '"' not in said:
        said = re.sub(r"\w+ \w+", r'"\g<0>"', said)
    return str(json.loads(said)[example.question.removeprefix("Key: ").strip('"')])


def codes(example: Example) -> str:
    """The first time that the key is said."""
    key = example.question.removeprefix("What is the code of ").rstrip("?")
    return said(rf"The code of {key} is (\S+?)\.")(example)


def joint(example: Example) -> str:
    """The value of the key in the context that is asked for."""
    asked = re.fullmatch(r"What is (\S+) in context (\S+)\?", example.question)
    assert asked is not None
    key, context = asked.groups()
    return said(rf"In context {context}, {key} is (\S+?)\.")(example)


def which_first(example: Example) -> str:
    """The segment whose beginning stands further ahead."""
    first, second = re.findall(r"^[AB]: (.*)$", example.question, re.MULTILINE)
    document = example.document
    return "A" if document.index(first) < document.index(second) else "B"


CHAPTER = re.compile(r"On ([^,]+), at the ([^,]+), (\w+ \w+) ([^.]+)\.")


def people_or_deeds(example: Example) -> str:
    """Everyone at the place, or everything that someone did there."""
    cue = re.fullmatch(r"At the ([^,]+),(?: (\w+ \w+))?", example.opening)
    assert cue is not None
    place, person = cue.groups()
    there = [(who, deed) for _, where, who, deed in CHAPTER.findall(example.document)
             if where == place]  # fmt: skip
    return ", ".join(deed if person else who for who, deed in there if person in (None, who))


def places(example: Example) -> str:
    """Where the person was, chapter by chapter."""
    found = re.search(r"was (\w+ \w+),", example.question)
    assert found is not None
    person = found.group(1)
    stops = [where for _, where, who, _ in CHAPTER.findall(example.document) if who == person]
    return ", ".join(place for place, _ in groupby(stops))


SOLVERS: dict[str, Callable[[Example], str]] = {
    "niah_single_1": needles, "niah_multikey_2": needles, "niah_multikey_3": needles,
    "niah_multivalue": needles, "niah_multiquery": needles, "vt": variables, "cwe": common,
    "fwe": frequent, "passkey": said(r"The pass key is (\d+)\."),
    "number_string": said(r"The sequence of digits is (\d+)\."), "kv_retrieval": key_values,
    "mqar": codes, "joint_recall": joint, "sort": which_first, "episodes": people_or_deeds,
    "chronology": places,
}  # fmt: skip
