"""A step's lines on their way to the workflow, which keeps them in its durable stream.

Each batch of lines is a signal, and costs the build's history four events. So the lines of a second
go together, and those of ever more seconds the more batches a build has had. Where steps are whole
(`HostLease.whole_steps`), the last lines of a step go with its result and cost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from temporalio.contrib.workflow_streams import WorkflowStreamClient
from temporalio.service import RPCError
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput, Interceptor

from activities.contract.names import LOG_TOPIC
from activities.contract.status import LogEntry, Told

FIRST_PAUSE_SECONDS = 1.0
LONGER_BY_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 5.0
MAX_BATCH_CHARS = 256 * 1024
MAX_CHARS_WITH_RESULT = 64 * 1024
FLUSH_LIMIT_SECONDS = 10.0
# What an entry has besides its message.
ENTRY_CHARS = 200

_with_result: ContextVar[list[LogEntry] | None] = ContextVar("with_result", default=None)


@dataclass
class Streamed:
    """How much of a build's log this host has sent to the stream."""

    lines: int = 0
    bytes: int = 0
    batches: int = 0

    @classmethod
    def read(cls, path: Path) -> Streamed:
        """Read what `write` has written; what cannot be read is nothing."""
        try:
            counts = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return cls()
        return cls(*counts) if isinstance(counts, list) and len(counts) in (2, 3) else cls()

    def write(self, path: Path) -> None:
        """Write it, for the next step."""
        path.write_text(json.dumps(astuple(self)))


def pause_seconds(batches: int) -> float:
    """Return how long the next lines of a build wait that has had so many batches."""
    return min(FIRST_PAUSE_SECONDS + LONGER_BY_SECONDS * batches, LONGEST_PAUSE_SECONDS)


class LogStream:
    """Sends lines to the workflow. Belongs to one event loop."""

    def __init__(self, client: WorkflowStreamClient, batches: int) -> None:
        """`batches` is how many the build has had before."""
        self.batches = batches
        self._client = client
        self._topic = client.topic(LOG_TOPIC, type=LogEntry)
        self._waiting: list[LogEntry] = []
        self._filled = asyncio.Event()
        self._sending = asyncio.create_task(self._send_for_ever())

    def add(self, entry: LogEntry) -> None:
        """Send a line with the next batch."""
        self._waiting.append(entry)
        self._filled.set()

    def give_last_to_result(self) -> None:
        """Let the lines that wait go with the result of the running activity, if it takes them."""
        if give_to_result(self._waiting):
            self._waiting = []

    async def close(self) -> None:
        """Send what is left. Raises what keeps it from being sent: RPCError or TimeoutError."""
        self._sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._sending
        async with asyncio.timeout(FLUSH_LIMIT_SECONDS):
            await self._send()

    async def _send_for_ever(self) -> None:
        while True:
            await self._filled.wait()
            await asyncio.sleep(pause_seconds(self.batches))
            with contextlib.suppress(RPCError, TimeoutError):  # the client keeps it
                await self._send()

    async def _send(self) -> None:
        await self._client.flush()  # what could not be sent before
        while self._waiting:
            self.batches += 1
            for entry in self._next_batch():
                self._topic.publish(entry)
            await self._client.flush()
        self._filled.clear()

    def _next_batch(self) -> list[LogEntry]:
        count, chars = 0, 0
        for entry in self._waiting:
            chars += _chars(entry)
            if count and chars > MAX_BATCH_CHARS:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch


def give_to_result(lines: Sequence[LogEntry]) -> bool:
    """Let lines go with the result of the running activity. False when it does not take them."""
    taken = _with_result.get()
    if taken is None or sum(map(_chars, lines)) > MAX_CHARS_WITH_RESULT:
        return False
    taken.extend(lines)
    return True


def _chars(entry: LogEntry) -> int:
    return ENTRY_CHARS + len(entry.message)


class LinesWithResult(Interceptor):
    """Has activities answer with the last lines of their log, where their workflow takes them."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        """Wrap the activity inbound chain."""
        return _LinesWithResult(next)


class _LinesWithResult(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:  # as the SDK says it
        lines: list[LogEntry] = []
        token = _with_result.set(lines)
        try:
            result = await super().execute_activity(input)
        finally:
            _with_result.reset(token)
        return Told(result=result, lines=tuple(lines)) if lines else result
