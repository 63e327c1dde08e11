"""Firecracker's log and metrics, as far as this stand-in has something to say in them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .errors import Fault
from .schema import Json

_LEVELS = {"off": 0, "error": 1, "warning": 2, "warn": 2, "info": 3, "debug": 4, "trace": 5}


class Log:
    """The log. Like Firecracker's it goes to standard output until it has a file of its own."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._level = _LEVELS["info"]
        self._show_level = False
        self._fd = sys.stdout.fileno()

    def configure(self, settings: Json) -> None:
        """Apply the settings that are given, keep the others."""
        level = settings.get("level", "info")
        if level.lower() not in _LEVELS:
            raise Fault(
                "An error occurred when deserializing the json body of a request: "
                "Invalid LevelFilter."
            )
        if "log_path" in settings:
            self._fd = _open_for_append(settings["log_path"], "Logger error")
        self._level = _LEVELS[level.lower()] if "level" in settings else self._level
        self._show_level = settings.get("show_level", self._show_level)

    def info(self, message: str) -> None:
        """Write a line that tells of normal work."""
        self._write("info", message)

    def error(self, message: str) -> None:
        """Write a line that tells of a failure."""
        self._write("error", message)

    def _write(self, level: str, message: str) -> None:
        if _LEVELS[level] > self._level:
            return
        now = time.time_ns()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now // 10**9))
        shown = f":{level.upper()}" if self._show_level else ""
        line = f"{stamp}.{now % 10**9:09} [{self._instance_id}:main{shown}] {message}\n"
        with suppress(OSError):  # who reads the log may be slow or go away; the VM stays
            os.write(self._fd, line.encode())


class Metrics:
    """How long Pause, Resume and snapshots took. Everything else Firecracker counts is left out."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._latencies_us: dict[str, int] = {}

    def configure(self, path: str) -> None:
        """Open the file that metrics are flushed to. Once only."""
        if self._fd is not None:
            raise Fault(
                "Metrics error: Cannot initialize the metrics system due to bad user input: "
                "Reinitialization of metrics not allowed."
            )
        self._fd = _open_for_append(path, "Metrics error")

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """Remember how long the block took, if it succeeds."""
        start = time.monotonic_ns()
        yield
        self._latencies_us[name] = (time.monotonic_ns() - start) // 1000

    def flush(self) -> None:
        """Append one JSON line."""
        if self._fd is None:
            raise Fault("Internal VMM error: Metrics error: Logger was not initialized.")
        now_ms = time.time_ns() // 10**6
        line = {"utc_timestamp_ms": now_ms, "latencies_us": self._latencies_us}
        os.write(self._fd, json.dumps(line).encode() + b"\n")


def _open_for_append(path: str, subject: str) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644)
    except OSError as error:
        raise Fault(
            f"{subject}: Failed to open target file: {error.strerror} (os error {error.errno})"
        ) from None
