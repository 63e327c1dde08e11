"""Mounts that cannot leak: made in a mount namespace (`namespaces`), which dies with its thread.

Whatever ends the thread or its process (an error, a cancel, SIGKILL), the kernel takes the mounts
and their loop devices away with the namespace.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from activities.disk.programs import child_environment

# linux/mount.h
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_NOATIME = 0x400
MS_REC = 0x4000
MS_SLAVE = 0x80000
# Of every mount of what a tenant has made: nothing in it is a device or a program of this host.
INERT = MS_NOSUID | MS_NODEV | MS_NOEXEC
INERT_OPTIONS = ("nosuid", "nodev", "noexec")
BUSY_SECONDS = 10.0
BUSY_PAUSE_SECONDS = 0.02
MAX_OPTIONS_BYTES = os.sysconf("SC_PAGE_SIZE") - 1  # mount(2) takes one page

_libc = ctypes.CDLL(None, use_errno=True)


class MountError(OSError):
    """A mount or unmount that the kernel refused."""


def mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    """mount(2). Raises MountError; also when the options are longer than a page."""
    encoded = os.fsencode(options)
    if len(encoded) > MAX_OPTIONS_BYTES:
        raise MountError(f"mount options of {len(encoded)} bytes are longer than a page")
    done = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), encoded
    )
    _check(done, f"mount {kind or source} on {target}")


def unmount(target: Path) -> None:
    """umount2(2). Raises MountError.

    Waits a while when it is busy: a child that another thread is starting has a copy of all of our
    descriptors, also of those in the mount, until it runs its program.
    """
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return _check(_libc.umount2(os.fsencode(target), 0), f"unmount {target}")
        except MountError as error:
            if error.errno != errno.EBUSY or time.monotonic() > give_up:
                raise
        time.sleep(BUSY_PAUSE_SECONDS)


@contextmanager
def merged_layers(root: Path, layers: list[str], target: Path) -> Iterator[None]:
    """Mount layers (paths under `root`, topmost first) read-only on `target`, as overlayfs does.

    Changes the thread's working directory: call it inside `in_mount_namespace`. Relative paths keep
    a hundred layers within the page that mount(2) takes.
    """
    os.chdir(root)
    options = "lowerdir=" + ":".join(layers)
    mount("overlay", target, "overlay", MS_RDONLY | MS_NOATIME | INERT, options)
    try:
        yield
    finally:
        os.chdir("/")
        unmount(target)


@contextmanager
def mounted_image(image: Path, target: Path, *options: str) -> Iterator[None]:
    """Mount a file that holds an ext4 on `target`; its loop device goes with the mount.

    What was written is on the disk when the body has ended. Raises MountError, and OSError when
    writing failed (the host's disk is full, say).
    """
    all_options = ",".join(("loop", *INERT_OPTIONS, *options))
    _run_mount(["mount", "-t", "ext4", "-o", all_options, image, target])
    try:
        yield
        sync_filesystem(target)
    finally:
        unmount(target)


def sync_filesystem(path: Path) -> None:
    """syncfs(2). Raises OSError when something that was written did not reach the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _check(_libc.syncfs(descriptor), f"sync {path}")
    finally:
        os.close(descriptor)


@contextmanager
def writing_out(path: Path) -> Iterator[None]:
    """Write out, while the body runs, what has been written before it. Raises as sync_filesystem.

    The disk has work then while the processor has; what the body writes is not part of it.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        written = pool.submit(sync_filesystem, path)  # in this thread's mount namespace
        yield
    written.result()


def mounts_under(directory: Path) -> list[Path]:
    """Return this process's mount points under `directory`, the deepest first."""
    prefix = f"{directory}/"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        points = [_unescape(line.split(" ")[4]) for line in table]
    return [Path(point) for point in reversed(points) if point.startswith(prefix)]


def _run_mount(command: list[str | Path]) -> None:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=child_environment()
    )
    if done.returncode != 0:
        raise MountError(f"{command[-2]} cannot be mounted: {done.stderr.strip()}")


def _unescape(text: str) -> str:
    for code in ("040", "011", "012", "134"):  # proc(5): space, tab, newline, backslash
        text = text.replace(f"\\{code}", chr(int(code, 8)))
    return text


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise MountError(number, f"cannot {what}: {os.strerror(number)}")
