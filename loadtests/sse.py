"""Server-sent events out of a byte stream, however it is cut into pieces.

The format is that of the HTML standard, section 9.2: lines end in LF, CRLF or CR, an empty line
ends an event, lines of data are joined, everything else is left out here.
"""

from __future__ import annotations

import re

_LINE = re.compile(rb"([^\r\n]*)(?:\r\n|\n|\r(?=.))", re.DOTALL)
MOST_BYTES = 64 * 2**20
"""Of an event; a stream without ends would fill the memory."""


class EventParser:
    """Fed with pieces, gives the data of every event that is complete."""

    def __init__(self) -> None:
        """Begins an empty stream."""
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The events that a piece completes.

        Args:
            piece: The stream's next bytes.

        Raises:
            ValueError: An event is longer than MOST_BYTES.
        """
        self._rest += piece
        found: list[bytes] = []
        place = 0
        while line := _LINE.match(self._rest, place):
            place = line.end()
            self._take(line.group(1), found)
        self._rest = self._rest[place:]
        if len(self._rest) > MOST_BYTES:
            raise ValueError("a server-sent event without an end")
        return found

    def _take(self, line: bytes, found: list[bytes]) -> None:
        """One line."""
        if not line:
            if self._data:
                found.append(b"\n".join(self._data))
            self._data = []
        elif line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
