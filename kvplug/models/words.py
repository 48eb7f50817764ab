"""Reads `words.txt`: the words that are one token each, by part of speech."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def word_sections() -> dict[str, tuple[str, ...]]:
    """Section name -> its words, in the file's order; no word is in two sections."""
    sections: dict[str, tuple[str, ...]] = {}
    name = ""
    for line in Path(__file__).with_name("words.txt").read_text(encoding="ascii").splitlines():
        if line.startswith("["):
            name = line.strip("[]")
            sections[name] = ()
        elif name:
            sections[name] += tuple(line.split())
    return sections


def all_words() -> list[str]:
    """Every word, in the file's order."""
    return [word for words in word_sections().values() for word in words]
