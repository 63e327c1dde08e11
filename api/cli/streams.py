"""Standard output and error of the command line: of any encoding, closed, full, read by nobody.

What cannot be written is no failure of what a command has done, and is told as what it is.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterator

READABLE = "template-manager.readable"
# One character each, so that columns stay below each other.
PLAIN_CHARACTERS = str.maketrans("→│✓✗↺·…–━╸╺•×", ">|+x<.~---=*x")


class OutputError(Exception):
    """What a command tells cannot be written. No OSError: nobody on its way takes it for theirs."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"cannot write to standard output: {cause.strerror}")
        self.is_unread = isinstance(cause, BrokenPipeError)
        """Nobody reads any more, such as `head` that has its lines."""


class Output(io.TextIOWrapper):
    """Standard output. Its methods raise OutputError."""

    def write(self, text: str, /) -> int:
        """Write as any file does."""
        with self._told():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush as any file does."""
        with self._told():
            super().flush()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(error) from None


class Errors(Output):
    """Standard error: of what fails here nobody can be told, and the command goes on."""

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        with contextlib.suppress(OSError):
            yield


def prepare_streams() -> None:
    """Let output never fail for a character that the terminal's encoding does not have, nor
    unnoticed, nor for a stream that is closed and not used.

    A closed one becomes one that cannot be written to, so that no file of ours gets its number.
    """
    codecs.register_error(READABLE, replace_unprintable)
    _fill_closed()
    sys.stdout = _wrapped(Output, sys.stdout, 1)
    sys.stderr = _wrapped(Errors, sys.stderr, 2)


def _fill_closed() -> None:
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:
            os.dup2(os.open(os.devnull, os.O_RDONLY), number)


def _wrapped(kind: type[Output], stream: object, number: int) -> Output:
    """Return standard output or error anew; what has been written to it stays before."""
    if isinstance(stream, io.TextIOWrapper):
        raw, encoding, by_line = stream.buffer, stream.encoding, stream.line_buffering
    else:
        raw, encoding, by_line = os.fdopen(number, "wb", closefd=False), "utf-8", False
    return kind(raw, encoding=encoding, errors=READABLE, line_buffering=by_line)


def give_up_output() -> None:
    """Have what cannot be written, and all that follows, go nowhere: Python tries again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def replace_unprintable(error: UnicodeError) -> tuple[str, int]:
    """Write what an encoding does not have as something like it, or as an escape.

    An error handler as `codecs.register_error` takes it.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    plain = bad.translate(PLAIN_CHARACTERS)
    return plain.encode("ascii", "backslashreplace").decode("ascii"), error.end
