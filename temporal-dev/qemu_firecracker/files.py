"""Files that exist whole or not at all, where that can be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """Write a new file durably, then rename it: VMs may still map the old one under this name.

    Where no name can be made, a file that is there is written anew, as Firecracker does.
    """
    if not os.access(path.parent, os.W_OK):
        with path.open("r+b") as file:
            file.truncate(0)
            yield file.fileno()
            os.fsync(file.fileno())
        return
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
