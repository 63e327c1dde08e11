"""The serial console: from QEMU to standard output, or to the file of `PUT /serial`.

Firecracker never waits for who reads its standard output: what the pipe does not take is lost, and
a line in the log says so. QEMU would hold the guest up instead, so it writes to a socket that is
always read.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from threading import Thread

_READ_BYTES = 65536


class SerialConsole:
    """Both directions of a guest's console; a thread of its own moves each."""

    def __init__(self, path: str | None, lost: Callable[[str], None]) -> None:
        """Open the file, if one is named: the guest then has no input, as in Firecracker.

        `lost` hears why something was dropped.
        """
        self._lost = lost
        self._has_input = path is None
        self._out = sys.stdout.fileno() if path is None else _open(path)
        self._ours, self.qemu_end = socket.socketpair()
        self._output: Thread | None = None

    def start(self) -> None:
        """Begin to move bytes, once QEMU has its end."""
        self.qemu_end.close()
        os.set_blocking(self._out, False)
        self._output = Thread(target=self._move_output, daemon=True)
        self._output.start()
        if self._has_input:
            Thread(target=self._move_input, daemon=True).start()

    def finish(self) -> None:
        """Wait until everything that QEMU wrote before its end has been moved."""
        if self._output is not None:
            self._output.join(timeout=5)

    def _move_output(self) -> None:
        while data := _received(self._ours):
            try:
                written = os.write(self._out, data)
            except OSError as error:
                self._lost(f"Failed the write to serial: {_told(error)}")
            else:
                if written < len(data):
                    self._lost(
                        f"Failed the write to serial: {_told(BlockingIOError(errno.EAGAIN))}"
                    )

    def _move_input(self) -> None:
        try:
            while data := os.read(sys.stdin.fileno(), _READ_BYTES):
                self._ours.sendall(data)
        except OSError:
            pass  # no input any more; the guest goes on


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_READ_BYTES)
    except ConnectionError:
        return b""


def _open(path: str) -> int:
    # What is in the file is written over from its beginning, and not cut off.
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _told(error: OSError) -> str:
    return f"{os.strerror(error.errno or 0)} (os error {error.errno})"
