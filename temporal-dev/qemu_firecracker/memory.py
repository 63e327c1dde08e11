"""Guest memory: of a running VM, and as the memory file of a snapshot.

- A booted VM has its memory in a memfd that QEMU maps shared. Nothing of it is left behind when
  both processes are killed.
- A VM that was loaded from a snapshot maps the memory file privately: it reads from the file as it
  needs to and never writes to it, so that many VMs can be loaded from one.

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
    shared: bool

    @classmethod
    def create(cls, size_mib: int) -> GuestMemory:
        """Zeroed memory for a VM to boot in."""
        fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_mib * MIB)
        return cls(fd, shared=True)

    @classmethod
    def open(cls, path: Path) -> GuestMemory:
        """The memory file of a snapshot."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), shared=False)

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return os.fstat(self.fd).st_size

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.fd)

    def copy_to(self, path: Path, qemu_pid: int) -> None:
        """Copy the memory of a paused VM to a file of the same size, dense as Firecracker's."""
        with files.replacing(path) as out:
            os.ftruncate(out, self.size)
            if self.shared:
                self._copy_file(out)
            else:
                self._copy_process(out, qemu_pid)

    def _copy_file(self, out: int) -> None:
        end = 0
        for start, next_end in _extents(self.fd, self.size):
            _write_zeros(out, end, start)
            os.lseek(out, start, os.SEEK_SET)
            end = start
            while end < next_end:
                end += os.sendfile(out, self.fd, end, next_end - end)
        _write_zeros(out, end, self.size)

    def _copy_process(self, out: int, pid: int) -> None:
        """What QEMU has written is in its private pages only, so read them through the process."""
        copied = 0
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as process:
            for address, offset, length in self._mappings(pid):
                for start in range(0, length, _CHUNK_BYTES):
                    wanted = min(_CHUNK_BYTES, length - start)
                    data = os.pread(process.fileno(), wanted, address + start)
                    os.pwrite(out, data, offset + start)
                    copied += len(data)
        if copied != self.size:
            raise OSError(f"only {copied} of {self.size} bytes of guest memory are mapped")

    def _mappings(self, pid: int) -> Iterator[tuple[int, int, int]]:
        """Address, offset in the file, and length of each part of the file that QEMU maps."""
        inode = str(os.fstat(self.fd).st_ino)
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            addresses, _, offset, _, mapped_inode, *_ = line.split(maxsplit=5)
            if mapped_inode == inode:
                start, end = (int(address, 16) for address in addresses.split("-"))
                yield start, int(offset, 16), end - start


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
