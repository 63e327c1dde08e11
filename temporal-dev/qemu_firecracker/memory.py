"""Guest memory: anonymous while the VM runs, a sparse file in a snapshot.

A booted VM has its memory in a memfd that QEMU maps shared, so this process can copy it without
QEMU's help and nothing is left behind when both are killed. The copy is made when the snapshot is:
a VM that is resumed afterwards does not write into the snapshot's file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1024 * 1024


def create(size_mib: int) -> int:
    """A file descriptor of that much zeroed memory."""
    fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
    os.ftruncate(fd, size_mib * MIB)
    return fd


def copy_to(memory: int, path: Path) -> None:
    """Copy all memory to a file, leaving holes where nothing was ever written."""
    size = os.fstat(memory).st_size
    with _replacing(path) as out:
        os.ftruncate(out, size)
        for position, end in _extents(memory, size):
            os.lseek(out, position, os.SEEK_SET)
            while position < end:
                position += os.sendfile(out, memory, position, end - position)  # noqa: PLW2901


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


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """Write a new file and rename it: VMs may still map the old one under this name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        yield fd
        os.fsync(fd)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
