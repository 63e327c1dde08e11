"""Making the ext4 of a root file system: how large, how made, how checked.

Sizes are bytes unless their name says blocks (of 4096 bytes).
"""

from __future__ import annotations

import os
import stat
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from activities.contract.errors import (
    FilesystemDamagedError,
    FilesystemToolError,
    HostDiskFullError,
)
from activities.contract.units import MIB
from activities.disk.limited_child import READS_ANY, ChildLimits, ChildTimeoutError, run_limited
from activities.disk.room import NO_ROOM_TOLD
from activities.disk.tree_content import BLOCK, Content, blocks_of

INODE_BYTES = 256
# Named one by one, so that the host's mke2fs.conf has no say and kernels from 4.14 on can mount it.
# There is no journal: nothing is recovered in a template, and it would be copied into each one.
FEATURES = (
    "none,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    "large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)
# e2fsck keeps a map of blocks and of inodes in memory: enough for a whole disk of 64 GiB.
FSCK_MEMORY_MB = 2048
# Of 4 GiB and more e2fsprogs read and write the bitmaps with a thread for each processor that the
# machine may have, and give up where they get none.
THREADS = os.sysconf("SC_NPROCESSORS_CONF")
TOOL_LIMITS = ChildLimits(seconds=1800, memory_mb=2048, threads=THREADS)
MIN_INODES = 1024
BYTES_PER_INODE = 16384  # mke2fs's usual ratio, so that the free space can be used for files too
SPARE_INODES = 256
MIN_BYTES = 8 * MIB
GROUP_BLOCKS = 8 * BLOCK  # as many as one block has bits
INODES_PER_BLOCK = BLOCK // INODE_BYTES
GROUPS_PER_BLOCK = BLOCK // 64  # descriptors, with the feature 64bit
MAX_GROWN_BLOCKS = (1 << 32) - 1  # resize_inode keeps room to grow a thousandfold, at most this far
TOP_BLOCKS = 8  # the root, lost+found, the inode for growing; two to spare
MAX_RESERVED_CLUSTERS = 4096  # ext4_calculate_resv_clusters: 2 % of the blocks, at most this


def bytes_for(content: Content, free_bytes: int) -> int:
    """Return the size of a file system with `free_bytes` left to root.

    A few blocks off, or some dozens where so many inodes are wanted that mke2fs makes its groups
    smaller.
    """
    wanted = content.blocks + blocks_of(free_bytes)
    inodes = inodes_for(content, free_bytes)
    total = wanted
    for _ in range(5):  # what it keeps grows with it, by ever less
        reserved = min(total // 50, MAX_RESERVED_CLUSTERS)
        total = wanted + reserved + _own_blocks(total, inodes)
    return max(total * BLOCK, MIN_BYTES)


def inodes_for(content: Content, free_bytes: int) -> int:
    """Return how many inodes to make: twice the image's, or mke2fs's usual number."""
    usual = (content.bytes + free_bytes) // BYTES_PER_INODE
    return max(MIN_INODES, 2 * content.files + SPARE_INODES, usual)


def make_filesystem(
    image: Path, content: Content, free_bytes: int, uuid: str, check: Callable[[], None]
) -> int:
    """Make an empty ext4 in the sparse file `image` that will have `free_bytes` free to root.

    "Free" is what `df` shows when `content` is in it. Returns the size in bytes.
    """
    size_bytes = bytes_for(content, free_bytes)
    inodes = inodes_for(content, free_bytes)
    wanted = content.bytes + free_bytes
    for _ in range(4):
        _mke2fs(image, size_bytes, inodes, uuid, check)
        excess = available_blocks(image) * BLOCK - wanted
        better = _whole_blocks(max(size_bytes - excess + 8 * BLOCK, MIN_BYTES))
        if 0 <= excess <= max(free_bytes // 200, 16 * BLOCK) or better == size_bytes:
            break
        size_bytes = better
    return image.stat().st_size


def make_filled_filesystem(
    image: Path, tree: Path, size_bytes: int, inodes: int, check: Callable[[], None]
) -> None:
    """Make an ext4 in the sparse file `image` with a copy of `tree`, which is ours, in it.

    Raises FilesystemToolError and HostDiskFullError.
    """
    whole = size_bytes // BLOCK * BLOCK
    _mke2fs(image, whole, inodes, str(uuid.uuid4()), check, tree=tree)


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


def used_inodes(image: Path) -> int:
    """Return how many inodes are in use, by the superblock (ext4(5)): what a guest says there."""
    with image.open("rb") as file:
        superblock = os.pread(file.fileno(), 1024, 1024)
    counts: tuple[int, ...] = struct.unpack_from("<I12xI", superblock)
    total, free = counts
    return max(0, total - free)


def resize_filesystem(image: Path, size_bytes: int, check: Callable[[], None]) -> None:
    """Grow or shrink an unmounted file system that has been checked."""
    before = image.stat().st_size
    if size_bytes > before:
        os.truncate(image, size_bytes)
    _change(image, ["resize2fs", "-f"], [f"{size_bytes // 1024}K"], check)
    if size_bytes < before:
        os.truncate(image, size_bytes)


def fsck_limits(seconds: int = 600) -> ChildLimits:
    """Return what e2fsck may take of a host for one disk."""
    return ChildLimits(seconds=seconds, memory_mb=FSCK_MEMORY_MB, threads=THREADS)


def check_filesystem(
    image: Path, check: Callable[[], None], *, limits: ChildLimits | None = None
) -> None:
    """Check an unmounted file system without changing it (`e2fsck -fn`).

    A guest may have written it. `check` is called often, and ends it by raising. Raises
    FilesystemDamagedError with what e2fsck says, or when it takes more time or memory than it may.
    """
    with _opened_to_nobody(image, "rb", 0o004) as (descriptor, name):
        try:
            end = run_limited(
                ["e2fsck", "-fn", name], limits or fsck_limits(), check, pass_fds=[descriptor]
            )
        except ChildTimeoutError as error:
            raise FilesystemDamagedError(f"{image.name}: {error}") from None
    if end.code != 0:
        lines = [*end.output.decode(errors="replace").splitlines(), *end.last_lines]
        raise FilesystemDamagedError(
            f"e2fsck found errors in {image.name} (exit code {end.code})", log_tail=lines
        )


def _own_blocks(total: int, inodes: int) -> int:
    """Count what an empty ext4 of so many blocks and inodes takes itself, as mke2fs lays it out."""
    groups = -(-total // GROUP_BLOCKS)
    tables = groups * -(-inodes // groups // INODES_PER_BLOCK)
    descriptors = -(-groups // GROUPS_PER_BLOCK)
    largest = -(-min(total * 1024, MAX_GROWN_BLOCKS) // GROUP_BLOCKS)
    to_grow = min(-(-largest // GROUPS_PER_BLOCK) - descriptors, BLOCK // 4)
    powers = (base**power for base in (3, 5, 7) for power in range(1, 21))
    copies = min(groups, 2) + sum(1 for group in powers if group < groups)  # sparse_super
    return tables + 2 * groups + copies * (1 + descriptors + to_grow) + TOP_BLOCKS


def _mke2fs(
    image: Path,
    size_bytes: int,
    inodes: int,
    name: str,
    check: Callable[[], None],
    *,
    tree: Path | None = None,
) -> None:
    image.unlink(missing_ok=True)
    with image.open("xb") as file:
        file.truncate(size_bytes)
    # The file is new and all zeros: nothing needs to be zeroed or discarded, now or by the guest.
    options = (
        f"lazy_itable_init=0,assume_storage_prezeroed=1,nodiscard,root_owner=0:0,hash_seed={name}"
    )
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", FEATURES, "-E", options, "-U", name]
    command += ["-b", str(BLOCK), "-I", str(INODE_BYTES), "-N", str(inodes), "-m", "0"]
    if tree is None:
        _change(image, command, [], check)
    else:  # our own files are for root alone
        _change(image, [*command, "-d", str(tree)], [], check, capabilities=READS_ANY)


def _change(
    image: Path,
    command: list[str],
    arguments: list[str],
    check: Callable[[], None],
    *,
    capabilities: Sequence[str] = (),
) -> None:
    """Run a tool that writes a file system. Raises FilesystemToolError and HostDiskFullError."""
    with _opened_to_nobody(image, "r+b", 0o006) as (descriptor, name):
        try:
            end = run_limited(
                [*command, name, *arguments],
                TOOL_LIMITS,
                check,
                capabilities=capabilities,
                pass_fds=[descriptor],
            )
        except ChildTimeoutError as error:
            raise FilesystemToolError(str(error)) from None
    if end.code != 0:
        said = " ".join(end.last_lines)[-400:]
        kind = HostDiskFullError if NO_ROOM_TOLD in said else FilesystemToolError
        raise kind(f"{command[0]} failed: {said}")


@contextmanager
def _opened_to_nobody(image: Path, mode: str, permissions: int) -> Iterator[tuple[int, str]]:
    """Have a descriptor of a file, and a name for it, by which nobody can open it.

    The directories above it stay closed to others: they cannot open it meanwhile.
    """
    with image.open(mode) as file:
        before = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        os.fchmod(file.fileno(), before | permissions)
        try:
            yield file.fileno(), f"/proc/self/fd/{file.fileno()}"
        finally:
            os.fchmod(file.fileno(), before)


def _whole_blocks(size_bytes: int) -> int:
    return blocks_of(size_bytes) * BLOCK
