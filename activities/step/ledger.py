"""A host's ledger of the builds that it holds, and the fence before every mutation.

`<data>/leases/<build_id>` is one JSON object a build. Its deadline is of CLOCK_BOOTTIME, which
goes on while the process is frozen or the machine suspended: a host that wakes up after its lease
has passed sees that, and refuses to act.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import structlog

from activities.contract.errors import LeaseLostError
from activities.contract.model import Model
from activities.contract.names import BuildId
from activities.contract.scope import BuildScope
from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover, entries, made_at
from activities.disk.room import NO_ROOM

DRAFT = ".tmp"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


_log = structlog.get_logger(__name__)


def boottime() -> float:
    """Return seconds since boot, suspend included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LedgerEntry(Model):
    """A build that this host holds."""

    build_id: BuildId
    template_id: str
    workflow_id: str
    number: int
    lifetime_seconds: float
    deadline: float
    """CLOCK_BOOTTIME seconds until which the host may act without renewing."""
    boot_id: str
    taken_at: float
    """Wall clock, seconds; the sweep leaves young entries alone."""
    memory_mb: int = 0
    """What its VM may take of the host; 0 of an earlier version's."""

    @property
    def expired(self) -> bool:
        """Whether the host must not act on this lease any more without renewing it."""
        return self.boot_id != current_boot_id() or boottime() > self.deadline


def current_boot_id() -> str:
    """Return an id that changes when the machine is rebooted."""
    return BOOT_ID.read_text().strip()


class LeaseLedger:
    """The entries on disk. Every write is a rename, so a reader sees all of one or nothing."""

    def __init__(self, data_dir: DataDir) -> None:
        self._data_dir = data_dir
        self._directory = data_dir.leases
        self._directory.mkdir(parents=True, exist_ok=True)

    def entries(self) -> list[LedgerEntry]:
        """Return all builds that this host holds."""
        names = [path.name for path in self._directory.iterdir() if not _is_draft(path)]
        return [entry for name in names if (entry := self.get(name)) is not None]

    def count(self) -> int:
        """Return how many slots are taken."""
        return sum(1 for path in self._directory.iterdir() if not _is_draft(path))

    def get(self, build_id: str) -> LedgerEntry | None:
        """Return the entry of a build, or None when this host does not hold it."""
        try:
            return LedgerEntry.model_validate_json(self._data_dir.lease(build_id).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def put(
        self,
        *,
        build_id: str,
        template_id: str,
        workflow_id: str,
        number: int,
        lifetime_seconds: float,
        memory_mb: int | None = None,
    ) -> LedgerEntry:
        """Take or renew: write the entry with a deadline `lifetime_seconds` from now.

        Without `memory_mb` it is what it was.
        """
        before = self.get(build_id)
        entry = LedgerEntry(
            build_id=build_id,
            template_id=template_id,
            workflow_id=workflow_id,
            number=number,
            lifetime_seconds=lifetime_seconds,
            deadline=boottime() + lifetime_seconds,
            boot_id=current_boot_id(),
            taken_at=before.taken_at if before else time.time(),
            memory_mb=memory_mb if memory_mb is not None else before.memory_mb if before else 0,
        )
        temporary = self._directory / f"{build_id}.{os.getpid()}{DRAFT}"
        temporary.write_text(json.dumps(entry.model_dump(mode="json")))
        temporary.replace(self._data_dir.lease(build_id))
        return entry

    def renew(self, entry: LedgerEntry) -> None:
        """Extend the deadline of an entry by its lifetime.

        On a disk without room it stays as it is: what has filled the disk may be this build's own
        snapshot, which is about to fail and to be removed.
        """
        try:
            self.put(
                build_id=entry.build_id,
                template_id=entry.template_id,
                workflow_id=entry.workflow_id,
                number=entry.number,
                lifetime_seconds=entry.lifetime_seconds,
            )
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            _log.warning("no room to renew a lease", build_id=entry.build_id, error=str(error))

    def remove(self, build_id: str, number: int) -> None:
        """Give the slot back, unless a later lease has taken the entry."""
        entry = self.get(build_id)
        if entry is not None and entry.number <= number:
            self._data_dir.lease(build_id).unlink(missing_ok=True)

    def leftovers(self) -> Iterator[Leftover]:
        """Yield the entries, and what no host can read: it would take a slot for ever."""
        for path in entries(self._directory):
            entry = None if _is_draft(path) else self.get(path.name)
            if entry is None:
                remove_file = partial(self._remove_unreadable, path)
                yield Leftover("lease", path.name, remove_file, made_at=made_at(path))
            else:
                build_id, number = entry.build_id, entry.number
                remove = partial(self.remove, build_id, number)
                yield Leftover("lease", build_id, remove, build_id, number, entry.taken_at)

    def _remove_unreadable(self, path: Path) -> None:
        if _is_draft(path) or self.get(path.name) is None:
            path.unlink(missing_ok=True)

    def require(self, scope: BuildScope) -> None:
        """Check that the host may act for `scope` now. Raises LeaseLostError.

        Called before each mutation; it reads one small file.
        """
        entry = self.get(scope.build_id)
        if entry is None:
            raise LeaseLostError(f"this host does not hold build {scope.build_id}")
        if entry.number != scope.lease.number:
            raise LeaseLostError(
                f"lease {scope.lease.number} of build {scope.build_id} has been replaced by "
                f"{entry.number}"
            )
        if entry.expired:
            raise LeaseLostError(f"the lease of build {scope.build_id} has expired on this host")


def _is_draft(path: Path) -> bool:
    """Whether it is an entry that was being written, by a process that may have died."""
    return path.name.endswith(DRAFT)
