"""The map of a host's data directory: every path under it, and what the names say.

No other module joins a name to the data directory. What is here stands on the disks of hosts that
earlier versions have run on: it stays.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from activities.contract.names import UUID_PATTERN, Step
from activities.contract.scope import BuildScope

_UNFINISHED = re.compile(rf"\.tmp\.(?P<build_id>{UUID_PATTERN})\.(?P<number>\d+)(?:[./]|$)")


class Maker(NamedTuple):
    """Which build has made something, and under which lease."""

    build_id: str
    lease_number: int


@dataclass(frozen=True)
class DataDir:
    """Everything that one host keeps. Names the places; whoever uses them makes them."""

    root: Path

    @property
    def leases(self) -> Path:
        """The ledger: an entry for each build that the host holds."""
        return self.root / "leases"

    @property
    def steps(self) -> Path:
        """Checkpoints, in a directory for each step."""
        return self.root / "steps"

    @property
    def vms(self) -> Path:
        """The working directories of VMMs."""
        return self.root / "vms"

    @property
    def networks(self) -> Path:
        """A mark for each netns that this host has made."""
        return self.root / "networks"

    @property
    def work(self) -> Path:
        """Where steps work, in a directory for each build."""
        return self.root / "work"

    @property
    def logs(self) -> Path:
        """Build logs."""
        return self.root / "logs"

    @property
    def images(self) -> Path:
        """A record for each image that this host has pulled."""
        return self.root / "images"

    @property
    def layers(self) -> Path:
        """A mark for each layer that a registry has given to this host."""
        return self.root / "layers"

    @property
    def locks(self) -> Path:
        """File locks between attempts."""
        return self.root / "locks"

    @property
    def draining_mark(self) -> Path:
        """A file that is there while the host takes no new builds."""
        return self.root / "draining"

    def probes(self) -> list[Path]:
        """What a killed doctor of a version before has left; this one's probe has no name."""
        return list(self.root.glob(".doctor.*"))

    def lease(self, build_id: str) -> Path:
        """Return the ledger's entry of a build."""
        return self.leases / build_id

    def checkpoint(self, step: Step, fingerprint: str) -> Path:
        """Return the directory of a finished checkpoint."""
        return self.steps / step / fingerprint

    def failed_step(self, build_id: str) -> Path:
        """Return where the disk of a build's failed step is kept, in the form of a checkpoint."""
        return self.steps / "failed" / hashlib.sha256(build_id.encode()).hexdigest()

    def unfinished_failed_step(self, scope: BuildScope) -> Path:
        """Return the directory in which that is made, see `maker_of`."""
        kept = self.failed_step(scope.build_id)
        return kept.with_name(f"{kept.name}{_mark(scope.build_id)}{scope.lease.number}.0")

    def unfinished_checkpoint(
        self, step: Step, fingerprint: str, scope: BuildScope, attempt: int
    ) -> Path:
        """Return the directory in which one attempt makes a checkpoint, see `maker_of`."""
        mark = _mark(scope.build_id)
        return self.steps / step / f"{fingerprint}{mark}{scope.lease.number}.{attempt}"

    def vm(self, name: str) -> Path:
        """Return the directory of a VM."""
        return self.vms / name

    def network_mark(self, name: str) -> Path:
        """Return the mark of a netns."""
        return self.networks / name

    def work_of(self, build_id: str) -> Path:
        """Return the directory of all that a build works on."""
        return self.work / build_id

    def log(self, build_id: str) -> Path:
        """Return where the whole log of a build is."""
        return self.logs / f"{build_id}.jsonl"

    def lock(self, name: str) -> Path:
        """Return the file of a lock."""
        return self.locks / name

    def contains(self, path: str) -> bool:
        """Whether a path that the kernel tells is in this directory: it has followed symlinks."""
        return Path(path).is_relative_to(self.root.resolve())


def make_closed(root: Path) -> None:
    """Make a data directory, or close one that was made open: what tenants own is in it.

    Raises OSError.
    """
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)


def maker_of(path: str) -> Maker | None:
    """Tell who makes the unfinished checkpoint in a path; None when there is none in it."""
    found = _UNFINISHED.search(path)
    return Maker(found["build_id"], int(found["number"])) if found else None


def is_made_by(build_id: str, path: str) -> bool:
    """Whether a path is in, or is, an unfinished checkpoint of a build."""
    return _mark(build_id) in path


def _mark(build_id: str) -> str:
    return f".tmp.{build_id}."
