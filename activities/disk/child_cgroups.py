"""A cgroup for each child that works on what a tenant has made, and what is left of such ones.

A child's own limits (setrlimit(2)) count address space; its cgroup counts what they miss: files in
memory, pages of files, what the kernel holds for it. They are `template-manager/child.<random>`
beside those of VMs. Whoever has made one holds a flock on it: one without belongs to a worker that
has died, and is removed with all that is in it by the next sweep of any host of the machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import structlog

from activities.contract.errors import HostFaultError
from activities.disk.cgroups import (
    PARENT,
    Limits,
    host_trees,
    kill_cgroup,
    make_cgroups,
    missing_controllers,
)
from activities.disk.leftovers import Leftover

NAMES = "child.*"
# In the child's own shell, before anything else of it runs. $1 is how many cgroups follow.
JOIN = (
    "left=$1; shift; "
    'while [ "$left" -gt 0 ]; do echo 0 >"$1/cgroup.procs" || exit 125; '
    "shift; left=$((left - 1)); done; "
    'unset PWD; exec "$@"'
)

_log = structlog.get_logger(__name__)


@contextmanager
def child_cgroups(limits: Limits) -> Iterator[list[Path]]:
    """Have the cgroups of one child; what is in them at the end is killed, and they are removed.

    None where none can be made: that is logged once, and the child's other limits hold all the
    same.
    """
    with contextlib.ExitStack() as held:
        made: list[Path] = []
        try:
            made = _make(limits, held)
        except OSError as error:
            _tell_once(f"no cgroup can be made: {error}")
        try:
            yield made
        finally:
            for directory in made:
                with contextlib.suppress(HostFaultError):  # then the sweep does it
                    kill_cgroup(directory)


def joining(cgroups: Sequence[Path], command: Sequence[str | Path]) -> list[str | Path]:
    """Return a command that runs `command` in these cgroups, or not at all."""
    return ["/bin/sh", "-c", JOIN, "sh", str(len(cgroups)), *cgroups, *command]


def leftover_child_cgroups() -> Iterator[Leftover]:
    """Yield the cgroups of children whose worker has died."""
    for parent in {tree.directory / PARENT for tree in host_trees()}:
        left: list[Path] = []
        # So that none is between its making and its lock; nobody may wait for us longer than that.
        with contextlib.suppress(FileNotFoundError), _locked(parent, fcntl.LOCK_EX):
            left = [directory for directory in sorted(parent.glob(NAMES)) if _is_left(directory)]
        for directory in left:
            yield Leftover("child cgroup", directory.name, partial(kill_cgroup, directory))


def _make(limits: Limits, held: contextlib.ExitStack) -> list[Path]:
    """Make and lock the cgroups; they stay locked while `held` lasts. Raises OSError."""
    trees = host_trees()
    if missing := missing_controllers(trees):
        _tell_once(missing)
    with contextlib.ExitStack() as making:
        for parent in {tree.directory / PARENT for tree in trees}:
            parent.mkdir(parents=True, exist_ok=True)
            making.enter_context(_locked(parent, fcntl.LOCK_SH))
        made = make_cgroups(f"child.{secrets.token_hex(8)}", limits, trees)
        for directory in made:
            held.enter_context(_locked(directory, fcntl.LOCK_EX))
    return made


@contextmanager
def _locked(directory: Path, how: int) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _is_left(directory: Path) -> bool:
    try:
        with _locked(directory, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return True
    except (BlockingIOError, FileNotFoundError):
        return False


@lru_cache(maxsize=8)
def _tell_once(why: str) -> None:
    _log.warning("children that work on tenants' files have no limits by cgroups", why=why)
