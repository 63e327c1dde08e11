"""Guest memory: of a running VM, and as the memory file of a snapshot.

A VM has its memory in a memfd that QEMU maps shared. Nothing of it is left behind when both
processes are killed. A VM that is loaded from a snapshot begins with a copy of the memory file, so
that many VMs can be loaded from one: QEMU maps nothing that it may only read.

A snapshot's memory file is always a copy, made while the VM is paused: a VM that goes on running
afterwards does not change it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import files

MIB = 1024 * 1024
_CHUNK_BYTES = MIB
_ZEROS = bytes(_CHUNK_BYTES)


@dataclass(frozen=True)
class GuestMemory:
    """The open file that QEMU maps as guest memory."""

    fd: int

    @classmethod
    def create(cls, size_bytes: int) -> GuestMemory:
        """Zeroed memory for a VM to boot in."""
        fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        return cls(fd)

    @classmethod
    def open(cls, path: Path) -> GuestMemory:
        """The memory file of a snapshot, in memory."""
        with path.open("rb", buffering=0) as file:
            memory = cls.create(os.fstat(file.fileno()).st_size)
            for start, end in _extents(file.fileno(), memory.size):
                for position in range(start, end, _CHUNK_BYTES):
                    data = os.pread(file.fileno(), min(_CHUNK_BYTES, end - position), position)
                    if data != _ZEROS[: len(data)]:
                        os.pwrite(memory.fd, data, position)
        return memory

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return os.fstat(self.fd).st_size

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.fd)

    def copy_to(self, path: Path) -> None:
        """Copy the memory of a paused VM to a file of the same size, dense as Firecracker's."""
        with files.replacing(path) as out:
            os.ftruncate(out, self.size)
            end = 0
            for start, next_end in _extents(self.fd, self.size):
                _write_zeros(out, end, start)
                os.lseek(out, start, os.SEEK_SET)
                end = start
                while end < next_end:
                    end += os.sendfile(out, self.fd, end, next_end - end)
            _write_zeros(out, end, self.size)


def _write_zeros(out: int, start: int, end: int) -> None:
    for position in range(start, end, _CHUNK_BYTES):
        os.pwrite(out, _ZEROS[: end - position], position)


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: no data after this
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
