"""Large sparse files: private copies and hashes that never read or write a hole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from activities.contract.units import MIB
from activities.disk.programs import child_environment

FICLONE = 0x40049409  # linux/fs.h
CHUNK_BYTES = 4 * MIB
ZEROS = bytes(CHUNK_BYTES)
POLL_SECONDS = 0.1
COPY_ERRORS_WITHOUT_REFLINK = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY)


def data_extents(descriptor: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of each stretch of data, by SEEK_DATA and SEEK_HOLE (lseek(2))."""
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        position = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, min(position, size_bytes) - start


def copy_private(
    source: Path,
    target: Path,
    check: Callable[[], None],
    copied: Callable[[int], None] = lambda _: None,
) -> None:
    """Copy a file so that writing to the copy leaves the source alone.

    A reflink where the disk can (no data is copied), else only the data between the holes.
    `check` is called about every 4 MiB and ends the copy by raising; `copied` is told the bytes
    of data that have been copied in all. Raises OSError.
    """
    with source.open("rb") as reader, target.open("wb") as writer:
        if _reflink(reader.fileno(), writer.fileno()):
            return
        size_bytes = os.fstat(reader.fileno()).st_size
        writer.truncate(size_bytes)
        done = 0
        for start, length in data_extents(reader.fileno(), size_bytes):
            for more in copy_extent(reader.fileno(), writer.fileno(), start, length, check):
                done += more
                copied(done)


def dig_holes(path: Path, check: Callable[[], None]) -> int:
    """Give back the disk's blocks that hold nothing but zeros; what is read stays the same.

    By util-linux's fallocate(1), which reads a block at a time. `check` is called while it runs and
    ends it by raising. Returns the bytes that are free again: 0 on a disk that knows no holes.
    """
    before = allocated_bytes(path)
    command = ["setpriv", "--pdeathsig", "KILL", "fallocate", "--dig-holes", str(path)]
    quiet = subprocess.DEVNULL
    digging = subprocess.Popen(
        command, stdin=quiet, stdout=quiet, stderr=quiet, env=child_environment()
    )
    try:
        while True:
            check()
            with contextlib.suppress(subprocess.TimeoutExpired):
                digging.wait(POLL_SECONDS)
                break
    finally:
        digging.kill()
        digging.wait()
    return max(0, before - allocated_bytes(path))


def sha256_of(
    path: Path, check: Callable[[], None], hashed: Callable[[int], None] = lambda _: None
) -> str:
    """Return the hex SHA-256 of the whole content; holes count as zeros but are not read.

    `check` is called about every 4 MiB and ends it by raising; `hashed` is told the bytes that have
    been hashed in all. Raises OSError.
    """
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        for piece in _content(file.fileno()):
            check()
            digest.update(piece)
            done += len(piece)
            hashed(done)
    return digest.hexdigest()


def allocated_bytes(path: Path) -> int:
    """Return how much of the disk a file takes."""
    return path.stat().st_blocks * 512


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reflink(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in COPY_ERRORS_WITHOUT_REFLINK:
            return False
        raise
    return True


def copy_extent(
    source: int, target: int, start: int, length: int, check: Callable[[], None]
) -> Iterator[int]:
    """Copy, yielding how many bytes each time."""
    done = 0
    while done < length:
        check()
        step = min(CHUNK_BYTES, length - done)
        copied = os.copy_file_range(source, target, step, start + done, start + done)
        if copied == 0:
            raise OSError(errno.EIO, "the source file became shorter while it was copied")
        done += copied
        yield copied


def _content(descriptor: int) -> Iterator[bytes]:
    """Yield all of a file in pieces; its holes as zeros, unread."""
    size_bytes = os.fstat(descriptor).st_size
    position = 0
    for start, length in data_extents(descriptor, size_bytes):
        yield from _zeros(start - position)
        yield from _data(descriptor, start, length)
        position = start + length
    yield from _zeros(size_bytes - position)


def _data(descriptor: int, start: int, length: int) -> Iterator[bytes]:
    done = 0
    while done < length:
        piece = os.pread(descriptor, min(CHUNK_BYTES, length - done), start + done)
        if not piece:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        done += len(piece)
        yield piece


def _zeros(length: int) -> Iterator[bytes]:
    while length > 0:
        step = min(CHUNK_BYTES, length)
        yield ZEROS[:step]
        length -= step
