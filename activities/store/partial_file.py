"""A file that is put together beside its place, range by range, and which of these have come.

`.NAME.part` is the file, `.NAME.part.list` says on its first line what it is to be, and then the
number of each range that has come, a line for each. A line is written after its range: whoever
wants the same file goes on with what a process that has died, or was told to stop, has left. After
a loss of power the list may say more than is so: the whole is to be checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from activities.contract.errors import StorageUnavailableError, TargetUnusableError
from activities.disk.locks import is_still

LINE = "{:08d}\n"
LINE_BYTES = len(LINE.format(0))
GOES_ON = (StorageUnavailableError, KeyboardInterrupt)
"""What leaves a file for the next one who wants it."""


class PartialFile:
    """A file of a size, holes where nothing has come, while nobody else writes it."""

    def __init__(
        self, path: Path, descriptor: int, listed: int, what: str, size_bytes: int
    ) -> None:
        """`what` tells it from any other that there could be in its place, on one line."""
        self.path = path
        self.descriptor = descriptor
        self._listed = listed
        self._head = f"{what}\n".encode()
        self._size_bytes = size_bytes
        self.done: set[int] = set()
        """The numbers of the ranges that have come."""
        if not self._go_on():
            self.start_anew()

    def _go_on(self) -> bool:
        told = os.pread(self._listed, os.fstat(self._listed).st_size, 0)
        if not told.startswith(self._head) or os.fstat(self.descriptor).st_size != self._size_bytes:
            return False
        lines = told[len(self._head) :].decode(errors="replace").splitlines(keepends=True)
        with contextlib.suppress(ValueError):  # of a torn line, which is the last
            self.done.update(int(line) for line in lines if len(line) == LINE_BYTES)
        return True

    def start_anew(self) -> None:
        """Forget all that has come."""
        self.done.clear()
        os.ftruncate(self._listed, 0)
        os.ftruncate(self.descriptor, 0)
        os.ftruncate(self.descriptor, self._size_bytes)
        os.pwrite(self._listed, self._head, 0)

    def came(self, number: int) -> None:
        """Note that a range has been written."""
        os.pwrite(
            self._listed,
            LINE.format(number).encode(),
            len(self._head) + LINE_BYTES * len(self.done),
        )
        self.done.add(number)


@contextmanager
def partial_file(target: Path, what: str, size_bytes: int) -> Iterator[PartialFile]:
    """Have the file that is to become `target`; the caller renames it there.

    Its size is `size_bytes`. It stays for the next one when the bucket is out of reach or the user
    ends the program, and is removed otherwise. Raises TargetUnusableError when another process
    writes it, and OSError.
    """
    place = target.with_name(f".{target.name}.part")
    listed = place.with_name(f"{place.name}.list")
    with contextlib.ExitStack() as opened:
        list_descriptor = opened.enter_context(_alone(listed, target))
        descriptor = opened.enter_context(_opened(place))
        try:
            yield PartialFile(place, descriptor, list_descriptor, what, size_bytes)
        except GOES_ON:
            raise
        except BaseException:
            _remove(place, listed)
            raise
        _remove(place, listed)


@contextmanager
def _alone(listed: Path, target: Path) -> Iterator[int]:
    while True:
        with _opened(listed) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TargetUnusableError(
                    f"another process is writing {target}",
                    hint="Wait until it has ended, or name another directory.",
                ) from None
            if is_still(listed, descriptor):  # whoever was done meanwhile has removed it
                yield descriptor
                return


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # it is in the way of what has gone wrong already
            path.unlink(missing_ok=True)
