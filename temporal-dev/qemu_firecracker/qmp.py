"""QEMU's control connection: commands, their answers, and events."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from typing import Any

_TIMEOUT_SECONDS = 60.0


class QmpError(Exception):
    """QEMU refused a command, does not answer, or is gone."""


class Qmp:
    """A QMP connection, used by one thread. Every wait ends after a minute at the latest."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self._events: deque[dict[str, Any]] = deque(maxlen=100)

    def negotiate(self) -> str:
        """Wait for QEMU's greeting; answer its version."""
        greeting = self._read_message(time.monotonic() + _TIMEOUT_SECONDS)
        version = greeting["QMP"]["version"]["qemu"]
        self.execute("qmp_capabilities")
        return f"{version['major']}.{version['minor']}.{version['micro']}"

    def execute(self, command: str, *, fd: int | None = None, **arguments: Any) -> Any:
        """Run a command, passing it a file descriptor if given; answer what it returns."""
        request = json.dumps({"execute": command, "arguments": arguments}).encode()
        try:
            socket.send_fds(self._connection, [request], [] if fd is None else [fd])
        except OSError as error:
            raise QmpError(f"QEMU is gone: {error}") from None
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            message = self._read_message(deadline)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"{command}: {message['error']['desc']}")
            self._events.append(message)

    def happened_at(self, event: str) -> float | None:
        """When QEMU says that the latest event of that name happened; seconds of the wall clock.

        Of those that came before the answer to the last command; None when there is none.
        """
        for message in reversed(self._events):
            if message.get("event") == event:
                stamp = message["timestamp"]
                return float(stamp["seconds"] + stamp["microseconds"] / 1e6)
        return None

    def wait_for_migration(self) -> None:
        """Wait until a migration has completed; `QmpError` says why it did not."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            event = self._events.popleft() if self._events else self._read_message(deadline)
            if event.get("event") != "MIGRATION":
                continue
            status = event["data"]["status"]
            if status == "completed":
                return
            if status == "failed":
                reason = self.execute("query-migrate").get("error-desc", "no reason given")
                raise QmpError(f"migration failed: {reason}")

    def _read_message(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            self._connection.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data = self._connection.recv(65536)
            except TimeoutError:
                raise QmpError("QEMU does not answer") from None
            except OSError as error:
                raise QmpError(f"QEMU is gone: {error}") from None
            if not data:
                raise QmpError("QEMU has exited")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message
