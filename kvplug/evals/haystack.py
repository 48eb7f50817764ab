"""Text in which facts are hidden: noise, made-up prose, or the user's own files."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvplug.errors import KvplugError

NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.",
    "There and back again.",
)  # fmt: skip
"""The filler of the passkey task (Mohtashami and Jaggi 2023), as RULER and InfiniteBench use it."""
SUFFIXES = (".txt", ".md", ".rst")
"""Files of a directory that are read."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Haystack(Protocol):
    """Where sentences come from."""

    def sentences(self, draw: random.Random, count: int) -> list[str]:
        """``count`` sentences."""
        ...


class Noise:
    """The five sentences of :data:`NOISE`, over and over."""

    def sentences(self, draw: random.Random, count: int) -> list[str]:
        """See :class:`Haystack`."""
        return [NOISE[i % len(NOISE)] for i in range(count)]


class Prose:
    """Made-up sentences of the bundled models' words: grammatical, without sense, never twice."""

    def sentences(self, draw: random.Random, count: int) -> list[str]:
        """See :class:`Haystack`."""
        from kvplug.models.documents import sentence

        return [sentence(draw) for _ in range(count)]


class Texts:
    """Sentences of text files, in order from a random one on.

    Args:
        texts: Their contents.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        """Cuts them into sentences."""
        self._sentences = [
            " ".join(sentence.split())
            for text in texts
            for sentence in _SENTENCE_END.split(text)
            if sentence.strip()
        ]

    @classmethod
    def of_directory(cls, directory: Path) -> Texts:
        """Reads every text file below a directory.

        Raises:
            KvplugError: There is none, or one is empty or not UTF-8 text.
        """
        files = sorted(path for path in directory.rglob("*") if path.suffix in SUFFIXES)
        if not files:
            raise KvplugError(f"No text files ({', '.join(SUFFIXES)}) below {str(directory)!r}.")
        return cls([_read(path) for path in files])

    def sentences(self, draw: random.Random, count: int) -> list[str]:
        """See :class:`Haystack`; begins anew where the files end."""
        first, total = draw.randrange(len(self._sentences)), len(self._sentences)
        return [self._sentences[(first + i) % total] for i in range(count)]


def _read(path: Path) -> str:
    """The text of a file.

    Raises:
        KvplugError: It holds none.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise KvplugError(f"{str(path)!r} is not UTF-8 text: take it out of the haystack.")
    if not text.strip():
        raise KvplugError(f"{str(path)!r} is empty: take it out of the haystack.")
    return text


def haystack(name: str) -> Haystack:
    """The haystack that a user names: ``noise``, ``prose``, or a directory.

    Raises:
        KvplugError: It is none of these.
    """
    if name == "noise":
        return Noise()
    if name == "prose":
        return Prose()
    directory = Path(name)
    if not directory.is_dir():
        raise KvplugError(f"Haystack {name!r} is neither 'noise' nor 'prose' nor a directory.")
    return Texts.of_directory(directory)
