"""What the guest says on its serial console.

Lines `@tm@ <kind> <text>` come from our script in the guest (`guest/start.sh`); every other line is
the kernel's or the image's own. The start command's output arrives as `out` and `err` lines, so it
cannot pose as one of ours.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from activities.contract.errors import (
    LOG_TAIL_LINES,
    GuestDiedError,
    ReadyTimeoutError,
    StartCommandError,
    TemplateManagerError,
)
from activities.step.build_log import BuildLog

PREFIX = "@tm@ "
READ_BYTES = 256 * 1024
MAX_LINE_BYTES = 16 * 1024
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
PANIC = "Kernel panic"
EXIT_MEANINGS = {126: " (not executable)", 127: " (not found)"}


class ConsoleReader:
    """Follows the console file from where the last reader stopped.

    How far it was read is kept beside the file, so that a worker that is restarted does not log
    lines twice.
    """

    def __init__(self, console: Path) -> None:
        self._console = console
        self._mark = console.with_name("console.read")
        self._position = self._read_mark()
        self._rest = b""

    def lines(self) -> list[str]:
        """Return the whole lines that have come since the last call."""
        try:
            with self._console.open("rb") as file:
                file.seek(self._position + len(self._rest))
                self._rest += file.read(READ_BYTES)
        except FileNotFoundError:
            return []
        whole, newline, rest = self._rest.rpartition(b"\n")
        if not newline and len(rest) > MAX_LINE_BYTES:  # endless: taken as a line
            whole, newline, rest = rest, b"", b""
        self._position += len(whole) + len(newline)
        self._rest = rest
        return [_clean(line) for line in whole.split(b"\n")] if whole else []

    def remember(self) -> None:
        """Keep how far the lines have been dealt with."""
        temporary = self._mark.with_suffix(".new")
        temporary.write_text(str(self._position))
        temporary.replace(self._mark)

    def _read_mark(self) -> int:
        try:
            return int(self._mark.read_text())
        except (FileNotFoundError, ValueError):
            return 0


@dataclass
class GuestReadiness:
    """What has been heard of the guest so far; logs it on the way."""

    log: BuildLog
    ready: bool = False
    attempts: int = 0
    last_attempt_code: int | None = None
    failure: TemplateManagerError | None = None
    panic: str = ""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_TAIL_LINES))
    console_tail: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_TAIL_LINES))

    def hear(self, line: str) -> None:
        """Take one line."""
        if not line.startswith(PREFIX):
            self._hear_console(line)
            return
        kind, _, text = line[len(PREFIX) :].partition(" ")
        handler = getattr(self, f"_hear_{kind.replace('-', '_')}", None)
        if handler is not None:
            handler(text)

    def timed_out(self, seconds: float) -> ReadyTimeoutError:
        """Return the error for a guest that was not ready in time."""
        tried = f"; the ready command was tried {self.attempts} times"
        code = self.last_attempt_code
        last = f", the last ended with exit code {code}{_meaning(code)}" if code is not None else ""
        return ReadyTimeoutError(
            f"the guest was not ready within {seconds:.0f} s{tried}{last}",
            log_tail=[*(self.tail or self.console_tail)],
        )

    def died(self, reason: str) -> TemplateManagerError:
        """Return the error for a guest that ended."""
        if self.failure is not None:
            return self.failure
        what = self.panic or f"the VM ended ({reason})"
        return GuestDiedError(
            f"the guest died before it was ready: {what}", log_tail=[*self.console_tail]
        )

    def _hear_console(self, line: str) -> None:
        if PANIC in line and not self.panic:
            self.panic = line  # a long trace follows
        if line.strip():
            self.console_tail.append(line)
            self.log.debug(line, source="console")

    def _hear_start(self, init: str) -> None:
        self.log.info(f"guest is up (init: {init})", source="guest")

    def _hear_out(self, text: str) -> None:
        self.tail.append(text)
        self.log.info(text, source="start command", stream="stdout")

    def _hear_err(self, text: str) -> None:
        self.tail.append(text)
        self.log.info(text, source="start command", stream="stderr")

    def _hear_start_exit(self, text: str) -> None:
        code = int(text.strip() or 0)
        self.log.info(f"start command ended with exit code {code}", source="guest")
        if code != 0 and not self.ready:
            self.failure = StartCommandError(
                f"the start command ended with exit code {code}{_meaning(code)}",
                log_tail=[*self.tail],
            )

    def _hear_ready_out(self, text: str) -> None:
        self.tail.append(f"ready command: {text}")
        self.log.info(text, source="ready command")

    def _hear_ready_attempt(self, text: str) -> None:
        number, _, code = text.partition(" ")
        self.attempts, self.last_attempt_code = int(number), int(code or 0)
        self.log.debug(f"ready command, attempt {number}: exit code {code}", source="guest")

    def _hear_ready(self, _: str) -> None:
        self.ready = True
        self.log.info("guest is ready", source="guest")

    def _hear_failed(self, text: str) -> None:
        self.failure = self.failure or StartCommandError(text, log_tail=[*self.tail])


def _meaning(code: int | None) -> str:
    return EXIT_MEANINGS.get(code or 0, "")


def _clean(line: bytes) -> str:
    return ESCAPES.sub("", line.decode(errors="replace"))
