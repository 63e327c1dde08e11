"""File locks between attempts, which may run in one process or in several."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover, entries, made_at

POLL_SECONDS = 0.05
OLD_SECONDS = 24 * 3600.0
"""A lock's file that is older is swept: whoever comes next makes it anew."""


@contextmanager
def locked(path: Path, check: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive flock on `path` while the body runs. Blocking: call it in a thread.

    `check` is called while waiting and ends the wait by raising. The kernel drops the lock when
    the process dies, so a crash leaves nothing to clean but an empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _wait_for(descriptor, check)
            if is_still(path, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock of that file now."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_lock(path: Path) -> None:
    """Remove a lock's file, unless somebody holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return
    finally:
        os.close(descriptor)


def leftover_locks(data_dir: DataDir) -> Iterator[Leftover]:
    """Yield the files of locks that are old; one that is held stays all the same."""
    for path in entries(data_dir.locks):
        if time.time() - made_at(path) > OLD_SECONDS:
            yield Leftover("lock", path.name, partial(remove_lock, path))


def _wait_for(descriptor: int, check: Callable[[], None]) -> None:
    while True:
        check()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(POLL_SECONDS)
        else:
            return


def is_still(path: Path, descriptor: int) -> bool:
    """Whether a path names the file that is open as `descriptor`."""
    # Whoever removed the file while we waited has left us the lock of a file that is gone.
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
