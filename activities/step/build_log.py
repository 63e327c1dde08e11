"""The build log: what users read of a build, line by line.

Each line goes to a file on the host (`<data>/logs/<build_id>.jsonl`, one JSON object a line, a
`LogEntry`) and, in batches, to the workflow's durable stream, where a client follows it
from any offset. Both are bounded: the stream by lines and bytes, the file, which is uploaded as
`build.log`, by what each step may write. Warnings and errors always get into the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
from temporalio import activity
from temporalio.contrib.workflow_streams import WorkflowStreamClient

from activities.contract.errors import LOG_TAIL_LINES
from activities.contract.names import UUID_PATTERN, Step
from activities.contract.status import LogEntry, LogLevel
from activities.contract.text import cut
from activities.contract.units import MIB
from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover, disk_bytes, entries, made_at
from activities.process.clock import utc_now
from activities.process.settings import Settings
from activities.step.log_stream import LogStream, Streamed
from activities.step.redaction import Redaction

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LogLimits:
    """How much is kept of what is said about a build."""

    line_chars: int = 4096
    step_bytes: int = 8 * MIB
    """Of one step in the file, but for its warnings and errors."""
    stream_lines: int = 5000
    stream_bytes: int = 16 * MIB

    @classmethod
    def of(cls, settings: Settings) -> LogLimits:
        """Return what the settings say."""
        return cls(
            settings.max_log_line_chars,
            settings.max_step_log_mb * MIB,
            settings.max_live_log_lines,
            settings.max_live_log_mb * MIB,
        )


USUAL_LIMITS = LogLimits()
_counting = threading.Lock()
"""Held while a counter's file is changed: layers are sent beside the steps of a build."""


class BuildLog:
    """Writes a step's lines. Thread-safe: blocking code logs from its own thread."""

    def __init__(
        self,
        path: Path,
        step: Step,
        stream: LogStream | None = None,
        limits: LogLimits = USUAL_LIMITS,
    ) -> None:
        """Append to `path`; `stream`, if any, belongs to the running event loop."""
        self.path = path
        self.limits = limits
        self._step = step
        self.step_number: int | None = None
        """Of the request's step that the lines from now on are about; None: of none of them."""
        self._stream = stream
        self._loop = asyncio.get_running_loop() if stream else None
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self.redaction = Redaction()
        self._written_bytes = 0
        self._is_full = False
        self._is_streamed = True
        path.parent.mkdir(parents=True, exist_ok=True)

    def redact(self, secret: str) -> None:
        """Never let `secret` through: it is replaced in every later line."""
        self.redaction.add(secret)

    def debug(self, message: str, **fields: str) -> None:
        """Write a line of level debug."""
        self.write(LogLevel.DEBUG, message, **fields)

    def info(self, message: str, **fields: str) -> None:
        """Write a line of level info."""
        self.write(LogLevel.INFO, message, **fields)

    def warn(self, message: str, **fields: str) -> None:
        """Write a line of level warn."""
        self.write(LogLevel.WARN, message, **fields)

    def error(self, message: str, **fields: str) -> None:
        """Write a line of level error."""
        self.write(LogLevel.ERROR, message, **fields)

    def write(self, level: LogLevel, message: str, **fields: str) -> None:
        """Write one line; one that is too long is cut and says so."""
        cleaned = self._clean(message)
        with self._lock:
            self._tail.append(cleaned)
            if self._is_full and level not in (LogLevel.WARN, LogLevel.ERROR):
                return
        entry = self._entry(level, cleaned, **fields)
        line = entry.model_dump_json() + "\n"
        with self._lock:
            self._append(line)
            publish = self._within_bounds(len(line))
        if publish:
            self._send(entry)

    def tail(self) -> list[str]:
        """Return the last lines that this step wrote."""
        with self._lock:
            return list(self._tail)

    def _clean(self, text: str) -> str:
        return cut(self.redaction.readable(text), self.limits.line_chars)

    def _entry(self, level: LogLevel, cleaned: str, **fields: str) -> LogEntry:
        return LogEntry(
            timestamp=utc_now(),
            level=level,
            message=cleaned,
            step=self._step,
            step_number=self.step_number,
            fields={name: self._clean(value) for name, value in fields.items()},
        )

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            self._written_bytes += len(line.encode())
            if self._written_bytes < self.limits.step_bytes or self._is_full:
                return
            self._is_full = True
            logged = f"{self.limits.step_bytes // MIB} MiB"
            full = f"this step has logged {logged}: the rest is left out"
            file.write(self._entry(LogLevel.WARN, full).model_dump_json() + "\n")

    def _send(self, entry: LogEntry) -> None:
        if self._stream and self._loop:
            self._loop.call_soon_threadsafe(self._stream.add, entry)

    def _within_bounds(self, size_bytes: int) -> bool:
        """Count what has gone to the stream, over all steps of the build on this host."""
        if not self._is_streamed:
            return False
        with _counting:
            streamed = self._count(_counter_of(self.path), size_bytes)
        if streamed is None:
            self._is_streamed = False
            return False
        if self._is_stream_full(streamed):
            self._say_where_the_rest_is()
        return True

    def _count(self, counter: Path, size_bytes: int) -> Streamed | None:
        """Return what has gone to the stream with one line more; None when it is full already."""
        streamed = Streamed.read(counter)
        if self._is_stream_full(streamed):
            return None
        streamed.lines += 1
        streamed.bytes += size_bytes
        streamed.batches = max(streamed.batches, self._stream.batches if self._stream else 0)
        streamed.write(counter)
        return streamed

    def _is_stream_full(self, streamed: Streamed) -> bool:
        limits = self.limits
        return streamed.lines >= limits.stream_lines or streamed.bytes >= limits.stream_bytes

    def _say_where_the_rest_is(self) -> None:
        entry = LogEntry(
            timestamp=utc_now(),
            level=LogLevel.WARN,
            message="the live log is full; the rest is in build.log and on the host",
            step=self._step,
        )
        self._send(entry)


@asynccontextmanager
async def open_build_log(
    data_dir: DataDir,
    build_id: str,
    step: Step,
    limits: LogLimits = USUAL_LIMITS,
    *,
    last_with_result: bool = False,
) -> AsyncIterator[BuildLog]:
    """Open the log of the running activity's build, and flush its lines at the end; with
    `last_with_result` those that then wait go with the activity's result, if it has one.

    A line that cannot be published (the workflow has closed, Temporal is away) is dropped from
    the stream and stays in the file: it never fails the step.
    """
    path = data_dir.log(build_id)
    stream = _stream_of_activity(path)
    log = BuildLog(path, step, stream, limits)
    if stream is None:
        yield log
        return
    try:
        yield log
        await asyncio.sleep(0)  # let lines from threads arrive
        if last_with_result:
            stream.give_last_to_result()
    finally:
        await asyncio.sleep(0)
        try:
            await stream.close()
        except Exception as error:
            _log.warning("build log lines not published", error=str(error))


def remove_build_log(data_dir: DataDir, build_id: str) -> None:
    """Remove a build's log from this host."""
    path = data_dir.log(build_id)
    for file in (path, _counter_of(path)):
        file.unlink(missing_ok=True)


def leftover_logs(data_dir: DataDir) -> Iterator[Leftover]:
    """Yield the logs of builds that this host keeps, with what counts their lines."""
    for path in entries(data_dir.logs):
        build_id = path.name.partition(".")[0]
        if re.fullmatch(UUID_PATTERN, build_id):
            remove = partial(path.unlink, missing_ok=True)
            size_bytes = disk_bytes(path)
            yield Leftover("log", path.name, remove, build_id, None, made_at(path), size_bytes)


def read_entries(path: Path) -> list[LogEntry]:
    """Read a log file back; a last line that a crash cut short is left out."""
    entries = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").split("\n"):  # texts have other line ends
            with contextlib.suppress(ValueError):
                entries.append(LogEntry.model_validate_json(line))
    return entries


def _counter_of(log: Path) -> Path:
    """Return the file that counts what of a log has gone to the stream."""
    return log.with_suffix(".streamed")


def _stream_of_activity(log: Path) -> LogStream | None:
    try:
        activity.client()
    except RuntimeError:  # outside a worker: a test of one activity
        return None
    client = WorkflowStreamClient.from_within_activity()
    return LogStream(client, Streamed.read(_counter_of(log)).batches)
