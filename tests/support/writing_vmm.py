#!/usr/bin/python3
"""A VMM that a guest has taken over: it writes wherever it can, and tells where that was.

It answers the API as `standin_vmm` does. `InstanceStart` is when its guest takes it over;
`GET /report` tells what came of it. With `flood` as its disk's first word it says without an end
whatever it can, instead.
"""

import contextlib
import ctypes
import errno
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support import standin_vmm

DISK = Path("/fc-vm/rootfs.ext4")
SOCKET = Path("/fc-vm/run/api.sock")
FAR = 1 << 45
DEPTH = 3
NOT_FILES = ("/proc", "/sys")
IPC_CREAT, IPC_PRIVATE = 0o1000, 0
Report = dict[str, Any]


def outcome(act: Callable[[], object]) -> str:
    """Return the name of the error that comes of it, "" for none."""
    try:
        act()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")
    except ValueError:  # Python's own of setrlimit
        return "EPERM"
    return ""


def directories(top: str, depth: int) -> Iterator[str]:
    """Yield what there is to write into."""
    yield top
    with contextlib.suppress(OSError):
        for entry in os.scandir(top) if depth else ():
            if entry.is_dir(follow_symlinks=False) and entry.path not in NOT_FILES:
                yield from directories(entry.path, depth - 1)


def can_make_a_file_in(directory: str) -> bool:
    """Try it in the two ways that there are."""
    path = f"{directory}/made"

    def named() -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        Path(path).unlink()

    def nameless() -> None:
        os.close(os.open(directory, os.O_TMPFILE | os.O_WRONLY))

    return not (outcome(named) and outcome(nameless))


def own_files() -> Iterator[str]:
    """Yield the files that are the VMM's to write to."""
    for top, _, names in os.walk("/fc-vm"):
        for name in names:
            path = Path(top, name)
            if path.is_file() and os.access(path, os.W_OK):
                yield str(path)


def report() -> Report:
    """Try all of it. (Python ignores SIGXFSZ by itself.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    return {
        "made": [each for each in directories("/", DEPTH) if can_make_a_file_in(each)],
        "files": list(own_files()),
        "largest": resource.getrlimit(resource.RLIMIT_FSIZE)[0],
        "grown": outcome(lambda: os.truncate(DISK, FAR)),
        "written far": outcome(lambda: os.pwrite(os.open(DISK, os.O_WRONLY), b"x", FAR)),
        "said far": outcome(lambda: os.pwrite(1, b"x", FAR)),
        "raised": outcome(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FAR, FAR))),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "unlinked": outcome(SOCKET.unlink),
        "linked": outcome(lambda: os.link(DISK, "/fc-vm/run/again")),
        "mounted": "" if libc.mount(b"x", b"/fc-vm/run", b"tmpfs", 0, None) == 0 else "refused",
        "shared memory": libc.shmget(IPC_PRIVATE, 1 << 20, IPC_CREAT | 0o600) >= 0,
        "ipc": str(Path("/proc/self/ns/ipc").readlink()),
    }


def flood() -> None:
    """Say lines that have no end, where the console is read and far beyond; log without a pause."""
    os.pwrite(1, b"x", 3 << 30)
    for descriptor, data in ((1, b"x" * (1 << 20)), (2, b"Failed the write to serial\n" * 40_000)):
        threading.Thread(target=say_forever, args=(descriptor, data), daemon=True).start()


def say_forever(descriptor: int, data: bytes) -> None:
    """Write it again and again."""
    while True:
        with contextlib.suppress(OSError):
            os.write(descriptor, data)


class Handler(standin_vmm.Handler):
    """Answers as the stand-in does, but for its own end."""

    told: Report = {}  # noqa: RUF012 # of the process

    def do_GET(self) -> None:
        """Answer the report, too."""
        if self.path == "/report":
            self._answer(200, Handler.told)
        else:
            super().do_GET()

    def do_PUT(self) -> None:
        """Be taken over."""
        self.rfile.read(int(self.headers["Content-Length"]))
        with DISK.open("rb") as disk:
            is_flood = disk.read(5) == b"flood"
        if is_flood:
            flood()
        else:
            Handler.told = report()
        self._answer(204)


if __name__ == "__main__":
    standin_vmm.serve(sys.argv, Handler)
