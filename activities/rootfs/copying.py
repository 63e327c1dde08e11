"""Copying an image's files into a file system."""

from __future__ import annotations

import os
import subprocess
import time
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE

from activities.contract.errors import FilesystemToolError, HostDiskFullError
from activities.contract.units import MIB
from activities.disk.archives import TAR
from activities.disk.limited_child import (
    MAKES_ANY,
    ChildLimits,
    ChildTimeoutError,
    limited_child,
    wait_for,
)
from activities.disk.tree_content import Content
from activities.rootfs.guest_root import IN_GUEST
from activities.step.running_step import RunningStep

COPY_ERROR_LINES = 20
COPY_ERROR_BYTES = 64 * 1024
# tar sets neither of them, but would write 1 KiB about them for each file.
WITHOUT = "--pax-option=delete=atime,delete=ctime"


def copy_tree(
    source: Path,
    target: Path,
    content: Content,
    place: Path,
    step: RunningStep,
    *,
    limits: ChildLimits,
) -> None:
    """Copy a tree with GNU tar and coreutils' cp, which keep all that ext4 can hold.

    All of it but `/.template`, where what we put into a guest comes. A pair of tars, one that reads
    while the other writes, is quicker than cp where looking files up takes long, as under many
    layers; cp is quicker for what is large. Raises HostDiskFullError or FilesystemToolError.
    """
    names = [name.encode("latin-1") for name in content.large_files]
    large = [name for name in names if not name.startswith(b".template/")]
    not_large = [b"--exclude=./" + name for name in large]
    reader = [*TAR, "--create", "--format=posix", WITHOUT, "--sparse", "-C", str(source)]
    reader += ["--anchored", "--no-wildcards", f"--exclude=.{IN_GUEST}"]
    reader += [*map(os.fsdecode, not_large), "."]
    writer = [*TAR, "--extract", "--same-owner", "--preserve-permissions", "--absolute-names"]
    copier = ["cp", "-d", "--parents", "--sparse=auto"]
    copier += ["--preserve=mode,ownership,timestamps,links,xattr", f"--target-directory={target}"]
    copier += ["--", *map(os.fsdecode, large)]
    follow = _Follower(target, content.bytes, step, limits)
    start = partial(limited_child, limits=limits, capabilities=MAKES_ANY, stdin=DEVNULL)
    messages = place / "copy.err"
    with messages.open("wb") as errors:
        if large:  # first: the writer sets the times of the directories that this adds to
            with start(copier, cwd=source, stderr=errors) as copies:
                follow(copies)
            _require_copied(messages, copies)
        with (
            start(reader, stdout=PIPE, stderr=errors, pipe_bytes=MIB) as reads,
            start([*writer, "-C", str(target)], stdin=reads.stdout, stderr=errors) as writes,
        ):
            assert reads.stdout is not None
            reads.stdout.close()  # only the writer has it: when that ends, the reader is told
            follow(writes)
            follow(reads)
        _require_copied(messages, reads, writes)


def _require_copied(messages: Path, *processes: subprocess.Popen[bytes]) -> None:
    if any(process.returncode for process in processes):
        lines = _last_lines(messages)
        kind = HostDiskFullError if "No space left" in "".join(lines) else FilesystemToolError
        raise kind(f"copying the image failed: {lines[-1] if lines else '?'}", log_tail=lines)


def _last_lines(messages: Path) -> list[str]:
    with messages.open("rb") as file:  # one for each file of the image, if it comes to that
        file.seek(max(0, messages.stat().st_size - COPY_ERROR_BYTES))
        return file.read().decode(errors="replace").splitlines()[-COPY_ERROR_LINES:]


class _Follower:
    """Waits for processes that fill a file system, and tells how far they are."""

    def __init__(
        self, target: Path, expected_bytes: int, step: RunningStep, limits: ChildLimits
    ) -> None:
        self._target = target
        self._expected_bytes = expected_bytes
        self._step = step
        self._empty = os.statvfs(target)
        self._limits = limits
        self._deadline = time.monotonic() + limits.seconds

    def __call__(self, process: subprocess.Popen[bytes]) -> None:
        try:
            wait_for(process, self._limits, self._deadline, self._tell)
        except ChildTimeoutError as error:
            raise FilesystemToolError(f"copying the image: {error}") from None

    def _tell(self) -> None:
        self._step.check()
        now = os.statvfs(self._target)
        done = min((self._empty.f_bfree - now.f_bfree) * now.f_bsize, self._expected_bytes)
        self._step.progress("copying the image", done, self._expected_bytes, "bytes")
