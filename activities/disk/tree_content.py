"""How much is in a file tree, and what it will need in an ext4.

Imports only the standard library and `tenant_tree`: it also runs in `activities.rootfs.tree_look`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from activities.disk.sparse_files import data_extents
from activities.disk.tenant_tree import RefusedTreeError, open_directory, open_file

BLOCK = 4096
CHECK_EVERY_ENTRIES = 256
LARGE_FILE_BYTES = 1024 * 1024
MAX_NAMES_BYTES = 512 * 1024
"""Of the names of large files as they go on a command line, of which the kernel takes 2 MiB."""
NAME_EXTRA_BYTES = 32
"""Of each: its pointer, its end, and the option before it."""
IN_INODE_SYMLINK_BYTES = 60  # ext4(5): a shorter target lives in the inode
IN_INODE_XATTR_BYTES = 92  # what a 256-byte inode has left, less the header
EXTENTS_IN_INODE = 4
EXTENTS_IN_BLOCK = 340


class TreeLimitError(RefusedTreeError):
    """A tree has more in it than it may."""

    def __init__(self, message: str, limit: str) -> None:
        super().__init__(message)
        self.limit = limit
        """Which one: a name of a field of `TreeLimits`."""


@dataclass(frozen=True)
class TreeLimits:
    """How much a tree may have in it."""

    entries: int
    path_bytes: int
    """The length of a path, from the tree's root."""


@dataclass
class Content:
    """What a file tree will need in an ext4."""

    files: int = 0
    blocks: int = 0
    apparent_bytes: int = 0
    large_files: list[str] = field(default_factory=list, repr=False)
    """Paths in the tree, a character for each byte (latin-1), with every name of those that have
    several; empty when there are too many."""

    @property
    def bytes(self) -> int:
        """Return the space that its blocks take."""
        return self.blocks * BLOCK

    def add(self, other: Content, small_files: int) -> None:
        """Make room for another tree and for some files or directories of one block each."""
        self.files += other.files + small_files
        self.blocks += other.blocks + small_files
        self.apparent_bytes += other.apparent_bytes


def measure(root: Path, limits: TreeLimits, check: Callable[[], None] = lambda: None) -> Content:
    """Walk a tree and count what it will need. Hard links count once, holes not at all.

    `check` is called about every 256 entries. Raises TreeLimitError, and OSError.
    """
    walk = _Walk(limits, check)
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        walk.run(top)
    finally:
        os.close(top)
    return walk.content


class _Walk:
    """One walk. Directories are opened one at a time, by their paths from the root."""

    def __init__(self, limits: TreeLimits, check: Callable[[], None]) -> None:
        self.content = Content(files=1)
        self._limits = limits
        self._check = check
        self._seen: set[int] = set()
        self._entries = 0
        self._names_bytes = 0

    def run(self, top: int) -> None:
        pending = [b""]
        while pending:
            path = pending.pop()
            directory = open_directory(top, path)
            try:
                pending += self._count_directory(directory, path)
            finally:
                os.close(directory)
        if self._names_bytes > MAX_NAMES_BYTES:
            self.content.large_files = []

    def _count_directory(self, directory: int, path: bytes) -> list[bytes]:
        name_bytes = 24  # `.` and `..`
        below = []
        with os.scandir(directory) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                whole = path + b"/" + name if path else name
                self._require_within(whole)
                name_bytes += 8 + (len(name) + 3) // 4 * 4
                status = entry.stat(follow_symlinks=False)
                self._count(directory, name, whole, status)
                if stat.S_ISDIR(status.st_mode):
                    below.append(whole)
        self.content.blocks += _directory_blocks(name_bytes)
        return below

    def _require_within(self, path: bytes) -> None:
        self._entries += 1
        if self._entries % CHECK_EVERY_ENTRIES == 0:
            self._check()
        if self._entries > self._limits.entries:
            raise TreeLimitError(
                f"it has more than {self._entries - 1} files and directories; the limit is "
                f"{self._limits.entries}",
                "entries",
            )
        if len(path) > self._limits.path_bytes:
            raise TreeLimitError(
                f"it has a path of {len(path)} bytes; the limit is {self._limits.path_bytes}",
                "path_bytes",
            )

    def _count(self, directory: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        is_file = stat.S_ISREG(status.st_mode)
        if is_file and status.st_size >= LARGE_FILE_BYTES:
            self._note_large(path)
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            inode = status.st_dev << 64 | status.st_ino
            if inode in self._seen:
                return
            self._seen.add(inode)
        content = self.content
        content.files += 1
        if is_file:
            content.apparent_bytes += status.st_size
            content.blocks += _file_blocks(directory, name, status)
        elif stat.S_ISLNK(status.st_mode) and status.st_size >= IN_INODE_SYMLINK_BYTES:
            content.blocks += 1
        content.blocks += _xattr_blocks(directory, name)

    def _note_large(self, path: bytes) -> None:
        self._names_bytes += len(path) + NAME_EXTRA_BYTES
        if self._names_bytes <= MAX_NAMES_BYTES:
            self.content.large_files.append(path.decode("latin-1"))


def _file_blocks(directory: int, name: bytes, status: os.stat_result) -> int:
    # A file may have few blocks because it has holes or because the host's disk compresses it.
    if status.st_blocks * 512 >= status.st_size:
        blocks = blocks_of(status.st_size)
        extents = 1 + blocks // 32768
    else:
        stretches = list(_stretches(directory, name, status.st_size))
        blocks = sum(blocks_of(end) - start // BLOCK for start, end in stretches)
        extents = len(stretches)
    return blocks + _extent_blocks(extents)


def _stretches(directory: int, name: bytes, size_bytes: int) -> Iterator[tuple[int, int]]:
    descriptor = open_file(directory, name)
    try:
        for start, length in data_extents(descriptor, size_bytes):
            yield start, start + length
    finally:
        os.close(descriptor)


def _extent_blocks(extents: int) -> int:
    return 0 if extents <= EXTENTS_IN_INODE else -(-extents // EXTENTS_IN_BLOCK)


def _xattr_blocks(directory: int, name: bytes) -> int:
    # There is no llistxat(2) everywhere: the descriptor's own name is a path to the directory.
    path = b"/proc/self/fd/%d/%s" % (directory, name)
    names = os.listxattr(path, follow_symlinks=False)
    if not names:
        return 0
    sizes = (
        16 + len(attribute) + len(os.getxattr(path, attribute, follow_symlinks=False)) + 6
        for attribute in names
    )
    return int(sum(sizes) > IN_INODE_XATTR_BYTES)


def _directory_blocks(name_bytes: int) -> int:
    # Leaves of the hash tree are split in halves as names come in: about two thirds are used.
    return 1 if name_bytes <= BLOCK - 12 else -(-name_bytes * 3 // (2 * BLOCK)) + 1


def blocks_of(size_bytes: int) -> int:
    """Return how many blocks so many bytes take."""
    return -(-size_bytes // BLOCK)
