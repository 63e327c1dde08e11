"""Making the ext4 of a root file system: how large, how made, how checked.

Sizes are bytes unless their name says blocks (of 4096 bytes).
"""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from activities.contract.errors import FilesystemDamagedError, FilesystemToolError
from activities.contract.units import MIB
from activities.disk.sparse_files import data_extents

BLOCK = 4096
INODE_BYTES = 256
# Named one by one, so that the host's mke2fs.conf has no say and kernels from 4.14 on can mount it.
# There is no journal: nothing is recovered in a template, and it would be copied into each one.
FEATURES = (
    "none,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    "large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)
MIN_INODES = 1024
BYTES_PER_INODE = 16384  # mke2fs's usual ratio, so that the free space can be used for files too
SPARE_INODES = 256
MIN_BYTES = 8 * MIB
MAX_RESERVED_CLUSTERS = 4096  # ext4_calculate_resv_clusters: 2 % of the blocks, at most this
CHECK_EVERY_ENTRIES = 256
LARGE_FILE_BYTES = MIB
IN_INODE_SYMLINK_BYTES = 60  # ext4(5): a shorter target lives in the inode
IN_INODE_XATTR_BYTES = 92  # what a 256-byte inode has left, less the header
EXTENTS_IN_INODE = 4
EXTENTS_IN_BLOCK = 340


@dataclass
class Content:
    """What a file tree will need in an ext4."""

    files: int = 0
    blocks: int = 0
    apparent_bytes: int = 0
    large_files: list[bytes] = field(default_factory=list, repr=False)
    """Paths in the tree, with every name of those that have several."""
    seen: set[tuple[int, int]] = field(default_factory=set, repr=False)

    @property
    def bytes(self) -> int:
        """Return the space that its blocks take."""
        return self.blocks * BLOCK

    def add(self, other: Content, small_files: int) -> None:
        """Make room for another tree and for some files or directories of one block each."""
        self.files += other.files + small_files
        self.blocks += other.blocks + small_files
        self.apparent_bytes += other.apparent_bytes


def measure(root: Path, check: Callable[[], None]) -> Content:
    """Walk a tree and count what it will need. Hard links count once, holes not at all."""
    content = Content()
    top = os.fsencode(root)
    pending = [top]
    content.files += 1
    since_check = 0
    while pending:
        directory = pending.pop()
        name_bytes = 24  # `.` and `..`
        with os.scandir(directory) as entries:
            for entry in entries:
                name_bytes += 8 + (len(entry.name) + 3) // 4 * 4
                _count(content, entry, top)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                since_check += 1
                if since_check % CHECK_EVERY_ENTRIES == 0:
                    check()
        content.blocks += _directory_blocks(name_bytes)
    content.seen.clear()
    return content


def bytes_for(content: Content, free_bytes: int) -> int:
    """Return a first guess at the size of a file system with `free_bytes` left to root."""
    inodes = inodes_for(content, content.bytes + free_bytes)
    total = content.bytes + free_bytes + inodes * INODE_BYTES + 2 * MIB
    reserved = min(total // BLOCK // 50, MAX_RESERVED_CLUSTERS) * BLOCK
    return _whole_blocks(max(total + reserved, MIN_BYTES))


def inodes_for(content: Content, size_bytes: int) -> int:
    """Return how many inodes to make: twice the image's, or mke2fs's usual number."""
    return max(MIN_INODES, 2 * content.files + SPARE_INODES, size_bytes // BYTES_PER_INODE)


def make_filesystem(image: Path, content: Content, free_bytes: int, uuid: str) -> int:
    """Make an empty ext4 in the sparse file `image` that will have `free_bytes` free to root.

    "Free" is what `df` shows when `content` is in it. Returns the size in bytes.
    """
    size_bytes = bytes_for(content, free_bytes)
    inodes = inodes_for(content, size_bytes)
    wanted = content.bytes + free_bytes
    for _ in range(4):
        _mke2fs(image, size_bytes, inodes, uuid)
        excess = available_blocks(image) * BLOCK - wanted
        if 0 <= excess <= max(free_bytes // 200, 16 * BLOCK):
            break
        size_bytes = _whole_blocks(max(size_bytes - excess + 8 * BLOCK, MIN_BYTES))
    return size_bytes


def available_blocks(image: Path) -> int:
    """Return what `df` would show as available, in blocks, from the superblock (ext4(5)).

    The kernel keeps 2 % of the blocks, at most 4096, back from `f_bavail`.
    """
    with image.open("rb") as file:
        superblock = os.pread(file.fileno(), 1024, 1024)
    low: tuple[int, ...] = struct.unpack_from("<III", superblock, 0x04)
    high: tuple[int, ...] = struct.unpack_from("<III", superblock, 0x150)
    total, reserved, free = (part | rest << 32 for part, rest in zip(low, high, strict=True))
    return max(0, free - reserved - min(total // 50, MAX_RESERVED_CLUSTERS))


def resize_filesystem(image: Path, size_bytes: int) -> None:
    """Grow or shrink an unmounted file system that has been checked."""
    before = image.stat().st_size
    if size_bytes > before:
        os.truncate(image, size_bytes)
    _run(["resize2fs", "-f", image, f"{size_bytes // 1024}K"])
    if size_bytes < before:
        os.truncate(image, size_bytes)


def check_filesystem(image: Path) -> None:
    """Check an unmounted file system without changing it (`e2fsck -fn`).

    Raises FilesystemDamagedError with what e2fsck says.
    """
    done = subprocess.run(
        ["e2fsck", "-fn", image], check=False, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).splitlines()
        raise FilesystemDamagedError(
            f"e2fsck found errors in {image.name} (exit code {done.returncode})", log_tail=lines
        )


def _mke2fs(image: Path, size_bytes: int, inodes: int, uuid: str) -> None:
    image.unlink(missing_ok=True)
    with image.open("xb") as file:
        file.truncate(size_bytes)
    # The file is new and all zeros: nothing needs to be zeroed or discarded, now or by the guest.
    options = (
        f"lazy_itable_init=0,assume_storage_prezeroed=1,nodiscard,root_owner=0:0,hash_seed={uuid}"
    )
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", FEATURES, "-E", options, "-U", uuid]
    command += ["-b", str(BLOCK), "-I", str(INODE_BYTES), "-N", str(inodes), "-m", "0"]
    _run([*command, image])


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise FilesystemToolError(f"{command[0]} failed: {done.stderr.strip()[-400:]}")


def _count(content: Content, entry: os.DirEntry[bytes], top: bytes) -> None:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode) and status.st_size >= LARGE_FILE_BYTES:
        content.large_files.append(entry.path[len(top) + 1 :])
    if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
        inode = (status.st_dev, status.st_ino)
        if inode in content.seen:
            return
        content.seen.add(inode)
    content.files += 1
    if stat.S_ISREG(status.st_mode):
        content.apparent_bytes += status.st_size
        content.blocks += _file_blocks(entry.path, status)
    elif stat.S_ISLNK(status.st_mode) and status.st_size >= IN_INODE_SYMLINK_BYTES:
        content.blocks += 1
    content.blocks += _xattr_blocks(entry.path)


def _file_blocks(path: bytes, status: os.stat_result) -> int:
    # A file may have few blocks because it has holes or because the host's disk compresses it.
    if status.st_blocks * 512 >= status.st_size:
        blocks = _blocks(status.st_size)
        extents = 1 + blocks // 32768
    else:
        stretches = list(_stretches(path, status.st_size))
        blocks = sum(_blocks(end) - start // BLOCK for start, end in stretches)
        extents = len(stretches)
    return blocks + _extent_blocks(extents)


def _stretches(path: bytes, size_bytes: int) -> Iterator[tuple[int, int]]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for start, length in data_extents(descriptor, size_bytes):
            yield start, start + length
    finally:
        os.close(descriptor)


def _extent_blocks(extents: int) -> int:
    return 0 if extents <= EXTENTS_IN_INODE else -(-extents // EXTENTS_IN_BLOCK)


def _xattr_blocks(path: bytes) -> int:
    names = os.listxattr(path, follow_symlinks=False)
    if not names:
        return 0
    sizes = (
        16 + len(name) + len(os.getxattr(path, name, follow_symlinks=False)) + 6 for name in names
    )
    return int(sum(sizes) > IN_INODE_XATTR_BYTES)


def _directory_blocks(name_bytes: int) -> int:
    # Leaves of the hash tree are split in halves as names come in: about two thirds are used.
    return 1 if name_bytes <= BLOCK - 12 else -(-name_bytes * 3 // (2 * BLOCK)) + 1


def _blocks(size_bytes: int) -> int:
    return -(-size_bytes // BLOCK)


def _whole_blocks(size_bytes: int) -> int:
    return _blocks(size_bytes) * BLOCK
