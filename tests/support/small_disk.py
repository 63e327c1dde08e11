"""A file system of a fixed size, to be filled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(directory: Path, mebibytes: int) -> Iterator[Path]:
    """Have an ext4 of that size mounted below `directory`; yields where."""
    image, point = directory / "disk.img", directory / "small"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(mebibytes << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


@contextmanager
def filled(disk: Path, left_bytes: int = 0) -> Iterator[None]:
    """Have no more than so much free there for a block."""
    ballast = disk / "ballast"
    try:
        with ballast.open("wb") as file:
            _fill(file.fileno(), disk, left_bytes)
        yield
    finally:
        ballast.unlink()


def _fill(file: int, disk: Path, left_bytes: int) -> None:
    """In ever smaller pieces: the file system takes some for itself."""
    piece = 64 << 20
    while piece >= 1024:
        if shutil.disk_usage(disk).free - left_bytes < piece or not _grow(file, piece):
            piece //= 2


def _grow(file: int, piece: int) -> bool:
    try:
        os.posix_fallocate(file, os.fstat(file).st_size, piece)
    except OSError:
        return False
    return True
