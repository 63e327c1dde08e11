"""How much room is left where a host writes, and how much of it stays free."""

from __future__ import annotations

import contextlib
import errno
import shutil
from dataclasses import dataclass
from pathlib import Path

from activities.contract.errors import HostDiskFullError
from activities.contract.units import MIB

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What a write fails with where there is none."""
NO_ROOM_TOLD = "No space left on device"
"""How programs tell of the first of them."""


@dataclass(frozen=True)
class Room:
    """The disks of a host. Each keeps so much free, whatever a build wants."""

    directories: tuple[Path, ...]
    kept_bytes: int

    def lacking(self, wanted_bytes: int = 0) -> str:
        """Say which disk has no room for so much, with both numbers; '' when all have.

        A directory that this process does not see counts for nothing.
        """
        needed = self.kept_bytes + wanted_bytes
        for directory in self.directories:
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(directory).free
                if free < needed:
                    return f"{directory} has {free // MIB} of {-(-needed // MIB)} MiB free"
        return ""

    def require(self, what: str, wanted_bytes: int = 0) -> None:
        """Require that there is room for so much; `what` it is for goes into the error.

        Raises HostDiskFullError.
        """
        if lacking := self.lacking(wanted_bytes):
            raise HostDiskFullError(
                f"there is no room to {what}: {lacking}",
                hint="Free space there (template-manager sweep, docker image prune), or lower "
                "TEMPLATE_MANAGER_MIN_FREE_DISK_MB.",
            )
