"""What an attack may not change on a host, besides what `host_resources` counts."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from activities.contract.units import MIB
from activities.disk.data_dir import DataDir
from activities.image.docker_daemon import make_docker_client

SETTLE_SECONDS = 60.0
MEMORY_BYTES = 192 * MIB
"""What this process may keep: modules that were not imported yet, and what allocators keep."""
DESCRIPTORS = 64
"""How many more may be open: of clients that are kept, such as Docker's."""
DOCKER_SECONDS = 60.0

_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class HostProcess:
    """This process, in which a test has the host's activities, and what it has started."""

    threads: frozenset[str]
    children: Counter[str]
    """How many have which command line: what a test restarts is as it was."""
    memory_bytes: int
    descriptors: int

    @classmethod
    def now(cls) -> HostProcess:
        """Look at it."""
        gc.collect()
        _libc.malloc_trim(0)
        own = psutil.Process()
        return cls(
            threads=frozenset(_busy_threads()),
            children=Counter(_running(own)),
            memory_bytes=own.memory_info().rss,
            descriptors=psutil.Process().num_fds(),
        )

    def left_since(self, before: HostProcess) -> dict[str, object]:
        """Return what there is more of."""
        found: dict[str, object] = {
            "threads": sorted(self.threads - before.threads),
            "children": sorted((self.children - before.children).elements()),
        }
        if self.memory_bytes - before.memory_bytes > MEMORY_BYTES:
            found["memory"] = (before.memory_bytes, self.memory_bytes)
        if self.descriptors - before.descriptors > DESCRIPTORS:
            found["descriptors"] = (before.descriptors, self.descriptors)
        return {kind: value for kind, value in found.items() if value}


@contextmanager
def host_as_before(place: Path) -> Iterator[None]:
    """Require that the block leaves this process as it was, and nothing of a host's own at work
    in a data directory in `place`: no slot, no work begun, no VM."""
    before = HostProcess.now()
    yield
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := _left(before, place)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left


@contextmanager
def dockerd_that_answers() -> Iterator[None]:
    """Require that it does after the block, soon, and has no more containers."""
    client = make_docker_client()
    before = {container["Id"] for container in client.containers(all=True)}
    yield
    deadline = time.monotonic() + DOCKER_SECONDS
    while left := {found["Id"] for found in client.containers(all=True)} - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    client.close()


def _left(before: HostProcess, place: Path) -> dict[str, object]:
    left = HostProcess.now().left_since(before)
    at_work = [str(path) for data in place.glob("data*") for path in _at_work(DataDir(data))]
    return {**left, "at work": at_work} if at_work else left


def _at_work(data_dir: DataDir) -> Iterator[Path]:
    for directory in (data_dir.vms, data_dir.work, data_dir.networks):
        yield from directory.glob("*")
    yield from data_dir.steps.glob("*/*.tmp.*")


def _busy_threads() -> Iterator[str]:
    """Yield the threads but for those of executors that wait for work: they are kept for more."""
    frames = sys._current_frames()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if frame is None or frame.f_code.co_name != "_worker":
            yield f"{thread.ident} {thread.name}"


def _running(own: psutil.Process) -> Iterator[str]:
    for child in own.children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                yield " ".join(child.cmdline()) or child.name()
        except psutil.NoSuchProcess:
            continue
