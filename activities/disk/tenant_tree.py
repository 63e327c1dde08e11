"""A file tree that a tenant has made, opened without trusting anything in it.

Every path is resolved by the kernel beneath the tree's root, links included (`openat2` with
RESOLVE_IN_ROOT): as in a container of the image, and never outside. What is there is looked at
before it is opened, and only regular files and directories ever are: a device, a FIFO or a socket
never. What is written stands under its name by a rename, so that nothing is written through.

No other module opens what is in such a tree (`tests/unit/test_tenant_trees.py`). Imports only the
standard library: it also runs in children (`activities.rootfs.tree_program`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import posixpath
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

OPENAT2 = 437  # the same number on every architecture
# linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
DIRECTORY_MODE = 0o755
FILE_MODE = 0o644

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class RefusedTreeError(Exception):
    """A tree is not taken, in words for its user."""

    limit = ""
    """Which limit of ours it is beyond, if it is one."""


class TooLargeError(Exception):
    """A file, or a line of one, is longer than what is read of it."""


class TenantTree:
    """The tree below one directory. Use it in a `with` block; paths are absolute or relative to it.

    Whatever cannot be resolved (nothing there, a loop, a link to nowhere, a name too long) is not
    there.
    """

    def __init__(self, root: Path) -> None:
        """Open the root. Raises OSError."""
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> TenantTree:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._root)

    # ---- Looking

    def status(self, path: str) -> os.stat_result | None:
        """Return what a path leads to, links followed; None when it leads nowhere."""
        with self._found(path) as found:
            return None if found is None else os.fstat(found)

    def has_name(self, path: str) -> bool:
        """Whether anything is there, be it a link to nowhere."""
        with self._found(path, os.O_NOFOLLOW) as found:
            return found is not None

    def is_directory(self, path: str) -> bool:
        """Whether it is one, or a link to one."""
        status = self.status(path)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def is_real_directory(self, path: str) -> bool:
        """Whether it is a directory itself, and no link."""
        with self._found(path, os.O_NOFOLLOW) as found:
            return found is not None and stat.S_ISDIR(os.fstat(found).st_mode)

    def is_program(self, path: str) -> bool:
        """Whether it is a regular file that somebody may execute."""
        status = self.status(path)
        return status is not None and stat.S_ISREG(status.st_mode) and bool(status.st_mode & 0o111)

    def real_path(self, path: str) -> str | None:
        """Return the absolute path in the tree, without links; None when it leads nowhere."""
        with self._found(path) as found:
            if found is None:
                return None
            top, whole = _name_of(self._root), _name_of(found)
            return "/" + whole.removeprefix(top).lstrip("/")

    def read(self, path: str, limit_bytes: int) -> bytes | None:
        """Return a regular file's content; None when there is none, whatever else is there.

        Raises TooLargeError with both sizes.
        """
        with self._found(path) as found:
            if found is None or not stat.S_ISREG(os.fstat(found).st_mode):
                return None
            with _reopened(found) as file:
                content = file.read(limit_bytes + 1)
                if len(content) <= limit_bytes:
                    return content
                size = os.fstat(found).st_size
        raise TooLargeError(f"{path} is {size} bytes; the limit is {limit_bytes}")

    def beginning(self, path: str, size_bytes: int) -> bytes:
        """Return the first bytes of a regular file; none of anything else."""
        with self._found(path) as found:
            if found is None or not stat.S_ISREG(os.fstat(found).st_mode):
                return b""
            with _reopened(found) as file:
                return file.read(size_bytes)

    # ---- Changing

    def make_directory(self, path: str, *, mode: int = DIRECTORY_MODE) -> bool:
        """Make a directory and what lacks above it; returns whether anything was made.

        Raises OSError when something else is in the way, and for a link that leads nowhere.
        """
        names = [name for name in path.split("/") if name not in ("", ".")]
        made = False
        for depth in range(1, len(names) + 1):
            if not self.is_directory("/".join(names[:depth])):
                with self._directory("/".join(names[: depth - 1])) as parent:
                    _make_in(parent, names[depth - 1], mode)
                made = True
        return made

    def make_real_directory(self, path: str) -> bool:
        """Make a directory in the place of whatever is there, but of a directory.

        Returns whether it was made. Raises OSError.
        """
        if self.is_real_directory(path):
            return False
        parent, name = posixpath.split(path)
        with self._directory(parent) as directory:
            _remove_in(directory, name)
            _make_in(directory, name, DIRECTORY_MODE)
        return True

    def replace_by_link(self, path: str, target: str) -> bool:
        """Put a symbolic link in the place of whatever is there; False when a directory is."""
        if self.is_real_directory(path):
            return False
        parent, name = posixpath.split(path)
        with self._directory(parent) as directory:
            _remove_in(directory, name)
            os.symlink(target, name, dir_fd=directory)
        return True

    def replace(self, path: str, content: bytes, *, mode: int = FILE_MODE) -> bool:
        """Put a file of root's in the place of whatever is there; False when that cannot be.

        It cannot when a directory is there, or when the directory that it belongs in is not there.
        """
        parent, name = posixpath.split(path)
        draft = f".template.{name}"
        try:
            with self._directory(parent) as directory:
                _remove_in(directory, draft)
                with _made_in(directory, draft, mode) as file:
                    file.write(content)
                try:
                    os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
                except OSError:
                    _remove_in(directory, draft)
                    raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            return False
        return True

    def add_file(self, path: str, source: BinaryIO, mode: int) -> None:
        """Make a file of root's where nothing is, of what `source` has. Raises OSError."""
        parent, name = posixpath.split(path)
        with self._directory(parent) as directory, _made_in(directory, name, mode) as file:
            shutil.copyfileobj(source, file)

    def add_link(self, path: str, target: str) -> None:
        """Make a symbolic link where nothing is. Raises OSError."""
        parent, name = posixpath.split(path)
        with self._directory(parent) as directory:
            os.symlink(target, name, dir_fd=directory)

    @contextmanager
    def times_kept(self, path: str) -> Iterator[None]:
        """Have a directory's times at the end of a block as they were before it."""
        before = self.status(path)
        yield
        if before is not None and stat.S_ISDIR(before.st_mode):
            with self._directory(path) as directory:
                os.utime(directory, ns=(before.st_atime_ns, before.st_mtime_ns))

    def set_mode(self, path: str, mode: int) -> None:
        """Set the permissions of a directory. Raises OSError."""
        with self._directory(path) as directory:
            os.fchmod(directory, mode)

    # ---- Opening

    @contextmanager
    def _found(self, path: str, flags: int = 0) -> Iterator[int | None]:
        """Have a descriptor of what is there, which opens nothing: O_PATH (open(2))."""
        try:
            found = self._open(path, os.O_PATH | flags)
        except OSError:
            yield None
            return
        try:
            yield found
        finally:
            os.close(found)

    @contextmanager
    def _directory(self, path: str) -> Iterator[int]:
        descriptor = self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, path: str, flags: int) -> int:
        return _openat2(self._root, os.fsencode(path), flags, RESOLVE_IN_ROOT)


def open_directory(root: int, path: bytes) -> int:
    """Open a directory below one that is open, by no link at all. Raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    return _openat2(root, path, flags, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)


def open_file(directory: int, name: bytes) -> int:
    """Open what is known to be a regular file of a directory, for reading. Raises OSError."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    opened = _openat2(directory, name, flags, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EINVAL, "not a regular file", name)
    return opened


def _openat2(root: int, path: bytes, flags: int, resolve: int) -> int:
    name = path.strip(b"/") or b"."
    if b"\0" in name:
        raise OSError(errno.EINVAL, "a name with a NUL", path)
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    opened: int = _libc.syscall(
        ctypes.c_long(OPENAT2), ctypes.c_long(root), name, ctypes.byref(how), size
    )
    if opened < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return opened


def _name_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


@contextmanager
def _reopened(found: int) -> Iterator[BinaryIO]:
    """Open for reading what has been looked at: not by its name, which may mean something else."""
    with open(f"/proc/self/fd/{found}", "rb") as file:
        yield file


def _make_in(directory: int, name: str, mode: int) -> None:
    os.mkdir(name, DIRECTORY_MODE, dir_fd=directory)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    made = os.open(name, flags, dir_fd=directory)
    try:
        os.fchown(made, 0, 0)
        os.fchmod(made, mode)
    finally:
        os.close(made)


@contextmanager
def _made_in(directory: int, name: str, mode: int) -> Iterator[BinaryIO]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=directory), "wb") as file:
        yield file
        os.fchown(file.fileno(), 0, 0)
        os.fchmod(file.fileno(), mode)


def _remove_in(directory: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
