"""A file of settings that an operator edits while the process runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class WatchedFile(Generic[T]):
    """What a file says, read again when it changes. One that cannot be read keeps the last."""

    def __init__(self, path: Path, parse: Callable[[str], T]) -> None:
        """Raises OSError, and what `parse` raises (a ValueError), when it cannot be read now."""
        self._path = path
        self._parse = parse
        self._read_at = self._stamp()
        self._content = parse(path.read_text())

    def current(self) -> T:
        """Return what the file says now."""
        try:
            stamp = self._stamp()
            if stamp != self._read_at:
                self._content = self._parse(self._path.read_text())
                self._read_at = stamp
                _log.info("file read again", path=str(self._path))
        except (OSError, ValueError) as error:
            _log.error(
                "file cannot be read: what it said last counts",
                path=str(self._path),
                error=str(error),
            )
        return self._content

    def _stamp(self) -> tuple[int, int, int]:
        status = self._path.stat()
        return status.st_mtime_ns, status.st_size, status.st_ino
