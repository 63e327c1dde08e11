"""The disk from which a step's VM runs: what does the step, and what it needs.

It is made for one step, written to by its guest as it likes, and thrown away unread. Values that
came from outside are files on it, never parts of a script; the files of a COPY are a tar that this
host does not look into.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from activities.contract.units import MIB
from activities.disk.ext4 import make_filled_filesystem
from activities.disk.room import Room
from activities.disk.taken_along import with_libraries
from activities.disk.tree_content import BLOCK, blocks_of
from activities.process.settings import Settings
from activities.rootfs.guest_files import copy_in, stage_programs, write_value

GUEST = Path(__file__).resolve().parent / "guest"
DRIVE = "step.ext4"
EMPTY_DIRECTORIES = ("dev", "proc", "sys", "run", "disk")
TOOLS = (("e2fsck", "e2fsprogs"), ("resize2fs", "e2fsprogs"), ("tar", "tar"))
# What is started by the image's own init, in the place of a template's command.
STARTS = {"RUN": "step.sh", "shell": "serve-shell.sh"}
SPARE_BYTES = 8 * MIB
# To unpack the files of a COPY, for each byte of their tar: an empty directory is 512 bytes there,
# and a block with an inode here. The drive is sparse: no more is taken of the host than is written.
UNPACKED_FACTOR = 9
UNPACKED_BYTES = 64 * MIB


@dataclass(frozen=True)
class StepFiles:
    """What the guest is given for one step."""

    what: str
    """`RUN`, `COPY`, `ADD`, `finish`, or `shell` for one on a disk that is looked at."""
    values: dict[str, str] = field(default_factory=dict)
    """Files in the guest's `/.template`, by their names there."""
    tar: Path | None = None
    """The files of a COPY or an ADD."""
    unpacked_mb: int = 0
    """What they may take at least when they are unpacked, in MiB, if the tar does not say more."""
    grows: bool = False
    """Whether the disk has become larger than its file system."""


def make_drive(
    place: Path, settings: Settings, step: StepFiles, room: Room, check: Callable[[], None]
) -> Path:
    """Make the drive in an empty directory; returns its path. `check` ends it by raising.

    Raises HostDiskFullError, HostFaultError and FilesystemToolError.
    """
    root = place / "root"
    for directory in (root, *(root / name for name in EMPTY_DIRECTORIES)):
        directory.mkdir()
        directory.chmod(0o755)  # whatever the umask is
    copy_in(GUEST / "init", root / "init", 0o755)
    copy_in(settings.busybox_path, root / "busybox", 0o755)
    _stage_tools(root / "tools")
    _stage_template(root / "template", settings, step)
    (root / "step").mkdir()
    write_value(root / "step" / "what", f"{step.what}\n")
    if step.grows:
        (root / "step" / "grow").touch()
    if step.tar is not None:
        os.link(step.tar, root / "files.tar")
    drive = place / DRIVE
    _make_filesystem(root, drive, step, room, check)
    return drive


def _stage_tools(directory: Path) -> None:
    directory.mkdir()
    for program, package in TOOLS:
        for name, path in with_libraries(program, package).items():
            if not (directory / name).exists():
                copy_in(path, directory / name, 0o755)


def _stage_template(directory: Path, settings: Settings, step: StepFiles) -> None:
    """Stage a `/.template`; that of a RUN runs the step where a template runs its command."""
    stage_programs(directory, settings)
    if step.what != "finish":
        (directory / "agent").unlink(missing_ok=True)
    scripts = {name: name for name in ("look.sh", "accounts.sh", "make.sh")}
    if step.what in ("COPY", "ADD"):
        scripts["copy.sh"] = "copy.sh"
    if step.what in STARTS:
        scripts |= {
            STARTS[step.what]: "start.sh",
            "template-start.service": "template-start.service",
        }
    if step.what == "shell":
        copy_in(GUEST / "shell", directory / "shell", 0o755)
    for source, name in scripts.items():
        (directory / name).unlink(missing_ok=True)  # it may be a name of the host's own file
        copy_in(GUEST / source, directory / name, 0o644)
    for name, value in step.values.items():
        write_value(directory / name, value, 0o600 if name == "env" else 0o644)


def _make_filesystem(
    root: Path, drive: Path, step: StepFiles, room: Room, check: Callable[[], None]
) -> None:
    content = sum(_blocks(path) for path in root.rglob("*")) * BLOCK
    unpacked = 0
    if step.tar:
        tar_bytes = step.tar.stat().st_size
        # The copy of it, and what most unpack to.
        room.require("unpack the files of a COPY", content + tar_bytes)
        unpacked = max(UNPACKED_BYTES, UNPACKED_FACTOR * tar_bytes, step.unpacked_mb * MIB)
    size_bytes = (content + unpacked + SPARE_BYTES) * 9 // 8
    make_filled_filesystem(drive, root, size_bytes, size_bytes // BLOCK, check)


def _blocks(path: Path) -> int:
    return 1 + blocks_of(path.lstat().st_size)
