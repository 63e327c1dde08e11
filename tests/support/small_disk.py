"""A file system of a fixed size, to be filled."""

from __future__ import annotations

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
