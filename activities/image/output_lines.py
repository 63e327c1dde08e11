"""What a container writes, line by line: in linear time and bounded memory, whatever it writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from activities.step.build_log import MAX_LINE_CHARS

MAX_LINE_BYTES = 16 * 1024
# What a log line has room for beside the words that say what was cut.
CUT_LINE_CHARS = MAX_LINE_CHARS - 64


def lines_in(parts: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a stream, without their ends."""
    lines = OutputLines()
    for part in parts:
        yield from lines.add(part)
    yield from lines.finish()


class OutputLines:
    """Puts the lines of a stream together. A line longer than MAX_LINE_BYTES is cut and says so."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._cut_bytes = 0

    def add(self, part: bytes) -> list[str]:
        """Take what has come; returns the lines that it ends, without their ends."""
        *ends, rest = part.split(b"\n")
        lines = []
        for end in ends:
            self._take(end)
            lines.append(self._ended())
        self._take(rest)
        return lines

    def finish(self) -> list[str]:
        """Return the last line, if it lacks its end."""
        return [self._ended()] if self._line else []

    def _take(self, part: bytes) -> None:
        room = MAX_LINE_BYTES - len(self._line)
        self._line += part[:room]
        self._cut_bytes += max(0, len(part) - room)

    def _ended(self) -> str:
        whole, cut_bytes = self._line.decode(errors="replace").rstrip("\r"), self._cut_bytes
        self._line.clear()
        self._cut_bytes = 0
        if not cut_bytes:
            return whole
        shown = whole[:CUT_LINE_CHARS]
        cut_bytes += MAX_LINE_BYTES - len(shown.encode())
        return f"{shown}… [{cut_bytes} more bytes cut]"
