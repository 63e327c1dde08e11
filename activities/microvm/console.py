"""What the guest says on its serial console.

Lines `@tm@ <kind> <text>` come from our script in the guest (`guest/start.sh`); every other line is
the kernel's or the image's own. The start command's output arrives as `out` and `err` lines, so it
cannot pose as one of ours.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from activities.contract.errors import (
    LOG_TAIL_LINES,
    GuestDiedError,
    ReadyTimeoutError,
    StartCommandError,
    TemplateManagerError,
    VmmEndedError,
)
from activities.contract.model import Model
from activities.contract.text import cut, readable, without_escapes
from activities.step.build_log import BuildLog

PREFIX = "@tm@ "
READ_BYTES = 256 * 1024
MAX_LINE_BYTES = 16 * 1024
CUT_CHARS = 64  # what was cut is told in the line
PANIC = "Kernel panic"
# What the kernel says last, whatever the level of its log, when it is the guest that ends.
GOODBYE = re.compile(
    r"reboot: (?:Restarting system|Power down|System halted)|sysrq: (?:Resetting|Power Off)"
)
# systemd's words when it waits for a person instead of going on, and on what has failed.
GIVEN_UP = re.compile(r"You are in (?P<mode>emergency|rescue) mode")
UNIT_FAILED = re.compile(r"\[(?:FAILED| TIME )\] (?P<what>.+)")
SYSTEMD_CHARS = 512  # its lines are shorter
JOB_RUNS = re.compile(r"(?P<what>A \w+ job is running for .+?|Job \S+ running) \(")
INIT_ENDED = re.compile(r"Attempted to kill init! exitcode=0x(?P<status>[0-9a-f]+)")
EXIT_MEANINGS = {126: " (not executable)", 127: " (not found)"}
NOT_RUNNABLE = frozenset(EXIT_MEANINGS)
# Of the VMM's own log, so many lines go into an error; the rest of it is the guest's last words.
VMM_LOG_LINES = 10
# So often in a row a ready command is not found before that is told as a warning.
NOT_FOUND_ATTEMPTS = 3
# A line whose end does not come is told after so long.
PART_SECONDS = 1.0


class Lost(Model):
    """What is not in the console's file, as the VM's supervisor counts it."""

    lines: int = 0
    """There was no room for them."""
    writes: int = 0
    """So often at least the VMM could not write: each may be a byte or more."""

    def __str__(self) -> str:
        told = []
        if self.lines:
            told.append(f"{self.lines} lines of the guest's console are left out")
        if self.writes:
            told.append(f"{self.writes} writes to it were lost while this host was too busy")
        return "; ".join(told)


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
        self._is_inside_line = self._stands_inside_line()

    def lines(self) -> list[str]:
        """Return the whole lines that have come since the last call, but for empty ones.

        Of a line that has no end only the beginning is one: what follows, wherever it is cut, must
        not be taken for a line of its own.
        """
        try:
            with self._console.open("rb") as file:
                file.seek(self._position + len(self._rest))
                self._rest += file.read(READ_BYTES)
        except FileNotFoundError:
            return []
        whole, newline, self._rest = self._rest.rpartition(b"\n")
        if not newline and len(self._rest) <= MAX_LINE_BYTES:
            return []
        if not newline:
            whole, self._rest = self._rest, b""
        self._position += len(whole) + len(newline)
        lines = whole.split(b"\n")
        begun, self._is_inside_line = self._is_inside_line, not newline
        return [_text_of(line) for line in (lines[1:] if begun else lines) if line]

    @property
    def position(self) -> int:
        """How many bytes of the console have been taken."""
        return self._position

    def lost(self) -> Lost:
        """Return what the guest has said and the file has not."""
        try:
            return Lost.model_validate_json(self._console.with_name("console.lost").read_text())
        except (FileNotFoundError, ValueError):
            return Lost()

    def remember(self) -> None:
        """Keep how far the lines have been dealt with."""
        temporary = self._mark.with_suffix(".new")
        temporary.write_text(str(self._position))
        temporary.replace(self._mark)

    def _stands_inside_line(self) -> bool:
        """Whether the last reader has stopped inside a line without an end."""
        if self._position == 0:
            return False
        with contextlib.suppress(FileNotFoundError), self._console.open("rb") as file:
            file.seek(self._position - 1)
            return file.read(1) != b"\n"
        return False

    def _read_mark(self) -> int:
        try:
            return int(self._mark.read_text())
        except (FileNotFoundError, ValueError):
            return 0


@dataclass
class LineParts:
    """The beginning of a line whose end has not come yet, as a prompt's never does."""

    text: str = ""
    left_out: int = 0
    """So many characters more have come."""
    since: float = 0.0
    """Monotonic clock, seconds, of the last part."""

    def add(self, part: str) -> None:
        """Take a part; of an endless line only the beginning is kept.

        Of a progress bar nobody sees what a carriage return has overwritten: it makes room.
        """
        text = self.text + part
        if len(text) > MAX_LINE_BYTES:
            before, _, last = text.rstrip("\r").rpartition("\r")
            if before:
                text, self.left_out = last, 0
        self.left_out += len(_whole_characters(text[MAX_LINE_BYTES:]))
        self.text = text[:MAX_LINE_BYTES]
        self.since = time.monotonic()

    def take(
        self, most_chars: int, conceal: Callable[[str, bool], str] = lambda text, _: text
    ) -> str:
        """Return what has come, made readable, as a line of at most so many characters, and begin
        anew.

        `conceal` is given it, and whether it is cut, before that.
        """
        whole, self.text = _whole_characters(self.text), ""
        left_out, self.left_out = self.left_out, 0
        text = readable(conceal(whole, left_out > 0))
        return cut(conceal(text, left_out > 0), most_chars - CUT_CHARS, left_out)


@dataclass
class GuestReadiness:
    """What has been heard of the guest so far; logs it on the way."""

    log: BuildLog
    ready: bool = False
    attempts: int = 0
    last_attempt_code: int | None = None
    failure: TemplateManagerError | None = None
    panic: str = ""
    goodbye: str = ""
    """The kernel's word that it ends; '' while it has not said one."""
    booting: str = ""
    """The init that the guest is about to begin with, such as `systemd /lib/systemd/systemd`."""
    init: str = ""
    """What is the guest's first process, such as `other /sbin/init`; '' before it says so."""
    holdup: str = ""
    """What systemd says that has failed; '' for nothing."""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_TAIL_LINES))
    console_tail: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_TAIL_LINES))
    _parts: dict[str, LineParts] = field(
        default_factory=lambda: {"stdout": LineParts(), "stderr": LineParts()}
    )
    _start_code: int | None = None
    _ready_out: str = ""
    _not_found: int = 0

    def hear(self, line: str) -> None:
        """Take one line. What a guest says is a claim: a line that makes no sense is left out."""
        if not line.startswith(PREFIX):
            self._hear_console(readable(line))
            return
        kind, _, text = line[len(PREFIX) :].partition(" ")
        handlers: dict[str, Callable[[str], None]] = {
            "init": self._hear_init,
            "start": self._hear_start,
            "out": lambda text: self._hear_output("stdout", text),
            "err": lambda text: self._hear_output("stderr", text),
            "out-part": self._parts["stdout"].add,
            "err-part": self._parts["stderr"].add,
            "start-exit": self._hear_start_exit,
            "ready-out": self._hear_ready_out,
            "ready-attempt": self._hear_ready_attempt,
            "ready": self._hear_ready,
            "failed": self._hear_failed,
        }
        if kind in handlers:
            handlers[kind](text)

    def tell_parts(self, *, now: bool = False) -> None:
        """Log beginnings of lines that have stood for a while; with `now` all of them."""
        for stream, parts in self._parts.items():
            if parts.text and (now or time.monotonic() - parts.since > PART_SECONDS):
                self._hear_output(stream, "")

    def timed_out(self, seconds: float) -> ReadyTimeoutError:
        """Return the error for a guest that was not ready in time."""
        self.tell_parts(now=True)
        if not (self.init or self.attempts or self.tail):
            return ReadyTimeoutError(
                f"the guest's init has not come to the start command within {seconds:.0f} s"
                f"{self._told_holdup()}",
                hint="See in the log of level debug what the guest's init waits for, or give it "
                "more time with a longer ready timeout.",
                log_tail=[*self.console_tail],
            )
        code = self.last_attempt_code
        tried = f"; the ready command was tried {self.attempts} times" if self.attempts else ""
        last = f", the last ended with exit code {code}{_meaning(code)}" if code is not None else ""
        return ReadyTimeoutError(
            f"the guest was not ready within {seconds:.0f} s{tried}{last}",
            log_tail=[*(self.tail or self.console_tail)],
        )

    def ended(self, reason: str, vmm_log: Sequence[str]) -> TemplateManagerError:
        """Return the error for a VM that ended, with what the VMM has logged.

        A guest that ends says so. When it has not, it was the VMM that ended, whatever its exit
        code: Firecracker's is 0 also when KVM cannot go on with the guest.
        """
        self.tell_parts(now=True)
        if self.failure is not None:
            return self.failure
        if self.panic or self.goodbye:
            return self._died(reason)
        said = f": {vmm_log[-1]}" if vmm_log else ""
        return VmmEndedError(
            f"Firecracker ended ({reason}) while its guest was running{said}",
            log_tail=[*self.console_tail, *vmm_log[-VMM_LOG_LINES:]],
        )

    def _died(self, reason: str) -> GuestDiedError:
        what = self.panic or f"{self.goodbye} ({reason})"
        ended = INIT_ENDED.search(self.panic)
        if ended:
            init = self.init or self.booting or "unknown"
            what = f"its init ({init}) ended with {_wait_status(ended['status'])}"
        return GuestDiedError(
            f"the guest died before it was ready: {what}", log_tail=[*self.console_tail]
        )

    def _hear_console(self, line: str) -> None:
        job = JOB_RUNS.search(line, 0, SYSTEMD_CHARS)
        if not line.strip() or (job and job["what"] == self.holdup):  # said twice a second
            return
        if not self.panic:  # after it a long trace follows, and nobody's last words
            self.console_tail.append(line)
        if PANIC in line and not self.panic:
            self.panic = line
        if found := GOODBYE.search(line):
            self.goodbye = found[0]
        if not self.init:
            self._hear_boot(line)
        self.log.debug(line, source="console")

    def _hear_boot(self, line: str) -> None:
        """Take a line of an init that has not come to the start command yet."""
        of_job = JOB_RUNS.search(line, 0, SYSTEMD_CHARS)
        if found := UNIT_FAILED.search(line, 0, SYSTEMD_CHARS) or of_job:
            self.holdup = found["what"].strip()
        given_up = GIVEN_UP.search(line)
        if given_up and self.failure is None:
            self.failure = GuestDiedError(
                f"systemd is in {given_up['mode']} mode; the start command has not begun"
                f"{self._told_holdup()}",
                hint="Mend or mask what systemd cannot start, or its default target; the log of "
                "level debug has its lines.",
                log_tail=[*self.console_tail],
            )

    def _told_holdup(self) -> str:
        return f": {self.holdup}" if self.holdup else ""

    def _hear_init(self, init: str) -> None:
        self.booting = readable(init)

    def _hear_start(self, init: str) -> None:
        self.init = readable(init)
        self.log.info(f"guest is up (init: {self.init})", source="guest")

    def _hear_output(self, stream: str, text: str) -> None:
        parts = self._parts[stream]
        parts.add(text)
        line = parts.take(self.log.limits.line_chars)
        self.tail.append(line)
        self.log.info(line, source="start command", stream=stream)

    def _hear_start_exit(self, text: str) -> None:
        self.tell_parts(now=True)
        code = _number(text)
        if code is None or code == self._start_code:  # said until it is heard
            return
        self._start_code = code
        self.log.info(f"start command ended with exit code {code}", source="guest")
        if code != 0 and not self.ready:
            self.failure = StartCommandError(
                f"the start command ended with exit code {code}{_meaning(code)}",
                log_tail=[*self.tail],
            )

    def _hear_ready_out(self, text: str) -> None:
        self._ready_out = readable(text)
        self.tail.append(f"ready command: {self._ready_out}")
        self.log.info(self._ready_out, source="ready command")

    def _hear_ready_attempt(self, text: str) -> None:
        told_number, _, told_code = text.partition(" ")
        number, code = _number(told_number), _number(told_code)
        if number is None or code is None:
            return
        self.attempts, self.last_attempt_code = number, code
        self.log.debug(f"ready command, attempt {number}: exit code {code}", source="guest")
        self._not_found = self._not_found + 1 if code in NOT_RUNNABLE else 0
        if self._not_found == NOT_FOUND_ATTEMPTS:
            self.log.warn(
                f"the ready command cannot be run, exit code {code}{_meaning(code)}: "
                f"{self._ready_out or 'it says nothing'}; it is tried on",
                source="guest",
            )

    def _hear_ready(self, text: str) -> None:
        if self.ready:  # the guest says it until it is heard
            return
        self.tell_parts(now=True)
        self.ready = True
        self.log.info("guest is ready", source="guest")
        if text.endswith(" time"):
            self.log.warn(
                "there is no ready command: the guest counts as ready when its start command has "
                "run for a second, whatever it may do then",
                source="guest",
            )

    def _hear_failed(self, text: str) -> None:
        self.tell_parts(now=True)
        self.failure = self.failure or StartCommandError(readable(text), log_tail=[*self.tail])


def _text_of(line: bytes) -> str:
    """Decode a line. A part of one may end inside a character: its bytes are kept (surrogates)."""
    text = line.decode(errors="surrogateescape")
    if not text.startswith(PREFIX):
        text = _whole_characters(text)
    return without_escapes(text).removesuffix("\r")


def _whole_characters(text: str) -> str:
    """Put bytes that were kept together again; what is no character then is U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode(errors="replace")


def _meaning(code: int | None) -> str:
    return EXIT_MEANINGS.get(code or 0, "")


def _number(text: str) -> int | None:
    """Read a small number that a guest says; None when it is none."""
    plain = text.strip()
    return int(plain) if plain.isascii() and plain.isdigit() and len(plain) < 10 else None


def _wait_status(status: str) -> str:
    """Say what a process's status (hexadecimal, wait(2)) means."""
    value = int(status, 16)
    signal = value & 0x7F
    return f"signal {signal}" if signal else f"exit code {value >> 8 & 0xFF}"
