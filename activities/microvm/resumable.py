"""By what a snapshot can be resumed: told when it is taken, compared before it is loaded.

A VMM that loads what it cannot read fails in words that name neither side, and a guest on another
processor may only crash later.
"""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from activities.contract.errors import MachineUnfitError, VmmError
from activities.disk.programs import child_environment
from activities.process.processor import this_processor

SAY_SECONDS = 10.0
FORMAT = re.compile(r"v?(?P<major>\d+)\.(?P<minor>\d+)\.\d+(?P<kind>\S*)")


@dataclass(frozen=True)
class SnapshotTraits:
    """What a snapshot and the machine that resumes it must agree about; '' is not known."""

    vmm_version: str
    snapshot_format: str
    architecture: str
    cpu_model: str


def traits_here(firecracker: Path) -> SnapshotTraits:
    """Return what this machine, with that Firecracker, resumes. Raises VmmError."""
    return SnapshotTraits(
        vmm_version=vmm_version(firecracker),
        snapshot_format=_told(firecracker, "--snapshot-version"),
        architecture=platform.machine(),
        cpu_model=cpu_model(),
    )


def require_resumable(made: SnapshotTraits, here: SnapshotTraits, firecracker: Path) -> None:
    """Check that a snapshot with the traits `made` can be resumed. Raises MachineUnfitError."""
    if made.architecture and made.architecture != here.architecture:
        raise MachineUnfitError(
            f"the template was made on {made.architecture}; this machine is {here.architecture}",
            hint="Run it on a machine of that architecture.",
        )
    if not _reads(here, made):
        format_there = f" (snapshot format {made.snapshot_format})" if made.snapshot_format else ""
        reads = f", which reads {here.snapshot_format}" if made.snapshot_format else ""
        raise MachineUnfitError(
            f"the template was made by Firecracker {made.vmm_version}{format_there}; "
            f"{firecracker} is {here.vmm_version}{reads}",
            hint="Install that Firecracker at that path.",
        )
    if made.cpu_model != here.cpu_model:
        raise MachineUnfitError(
            f"the template was made on the CPU model {made.cpu_model}; this machine's is "
            f"{here.cpu_model}",
            hint="Run it on a machine with that CPU.",
        )


def snapshot_format(firecracker: Path, version: str) -> str:
    """Return the format of what a Firecracker of that version writes; '' when it cannot be told.

    The snapshot itself is not looked at: the VMM that wrote it ran a guest, and may have written
    anything. `firecracker` may have been replaced since.
    """
    try:
        here = traits_here(firecracker)
    except VmmError:
        return ""
    return here.snapshot_format if here.vmm_version == version else ""


def vmm_version(firecracker: Path) -> str:
    """Return what `firecracker --version`, or a jailer's, says, without the name.

    Raises VmmError.
    """
    return _said(firecracker, "--version").strip().rpartition(" ")[2].removeprefix("v")


def cpu_model() -> str:
    """Return the CPU's name: a snapshot resumes on the same model only."""
    return this_processor().get("model name", platform.machine())


def _reads(here: SnapshotTraits, made: SnapshotTraits) -> bool:
    """Whether the VMM reads the snapshot: the same major format, and no newer a minor one.

    Where one of the two is not known (a template of an earlier version, an odd VMM), it must be the
    very same Firecracker.
    """
    ours, theirs = (FORMAT.fullmatch(each.snapshot_format) for each in (here, made))
    if ours is None or theirs is None:
        return here.vmm_version == made.vmm_version
    same = (ours["major"], ours["kind"]) == (theirs["major"], theirs["kind"])
    return same and int(theirs["minor"]) <= int(ours["minor"])


def _told(firecracker: Path, *arguments: str) -> str:
    try:
        said = _said(firecracker, *arguments).strip()
    except VmmError:
        return ""
    return said.removeprefix("v") if FORMAT.fullmatch(said) else ""


def _said(firecracker: Path, *arguments: str) -> str:
    """Return the first line of output; log lines may follow it."""
    try:
        said = subprocess.run(
            [firecracker, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SAY_SECONDS,
            check=True,
            env=child_environment(),
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise VmmError(f"{firecracker} {arguments[0]} does not work: {error}") from error
    return said.stdout.split("\n", 1)[0]
