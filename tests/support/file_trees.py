"""Reading a mounted file tree field by field, to hold a template's root against its image."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import docker

from activities.disk import mounts
from activities.disk.namespaces import in_mount_namespace
from activities.image.docker_daemon import find_image
from activities.rootfs.rootfs import image_layers

T = TypeVar("T")

# What a template adds or replaces: nothing else may differ from the image.
ADDED = "/.template"
ADDED_DIRECTORIES = {"/proc", "/sys", "/dev", "/etc"}
# As a container engine does.
REPLACED = {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab"}


@dataclass(frozen=True)
class Entry:
    """Everything that a file system keeps of one name."""

    kind: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    content: str
    device: tuple[int, int]
    xattrs: tuple[tuple[str, bytes], ...]
    links: tuple[bytes, ...]
    """All names of the same file: hard links stay hard links."""


def read_tree(root: Path) -> dict[str, Entry]:
    """Return every entry by its path from `/`. Names are decoded so that any bytes survive."""
    found: dict[bytes, os.stat_result] = {}
    names: dict[int, list[bytes]] = {}
    for path in _walk(os.fsencode(root)):
        status = os.lstat(path)
        name = path[len(os.fsencode(root)) :] or b"/"
        found[name] = status
        if not stat.S_ISDIR(status.st_mode):
            names.setdefault(status.st_ino, []).append(name)
    return {
        os.fsdecode(name): _entry(os.fsencode(root) + name, status, names.get(status.st_ino, []))
        for name, status in found.items()
    }


def difference(image: dict[str, Entry], template: dict[str, Entry]) -> dict[str, object]:
    """Return what differs, by path; without what a template may add or replace."""
    found: dict[str, object] = {}
    for name in image.keys() | template.keys():
        if name == ADDED or name.startswith(f"{ADDED}/"):
            continue
        before, after = image.get(name), template.get(name)
        if name in REPLACED or (before is None and name in ADDED_DIRECTORIES):
            continue
        if before != after:
            found[name] = (before, after)
    return found


def tree_of_image(client: docker.APIClient, image: str, place: Path) -> dict[str, Entry]:
    """Read an image as overlayfs merges its layers; `place` is an empty directory."""
    inspected = find_image(client, image)
    assert inspected is not None
    root, layers = image_layers(inspected)
    merged, empty = place / "merged", place / "empty"
    merged.mkdir(parents=True)
    empty.mkdir()

    def read() -> dict[str, Entry]:
        with mounts.merged_layers(root, [*layers, str(empty)], merged):
            return read_tree(merged)

    return in_mount_namespace(read)


def tree_of_ext4(image: Path, place: Path) -> dict[str, Entry]:
    """Read an ext4 image, mounted read-only on the directory `place`."""
    return in_mounted_ext4(image, place, lambda: read_tree(place))


def in_mounted_ext4(image: Path, place: Path, function: Callable[[], T]) -> T:
    """Run a function while an ext4 image is mounted read-only on `place`."""
    place.mkdir(parents=True, exist_ok=True)

    def run() -> T:
        with mounts.mounted_image(image, place, "ro"):
            return function()

    return in_mount_namespace(run)


def _walk(root: bytes) -> Iterator[bytes]:
    yield root
    pending = [root]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                yield entry.path
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)


def _entry(path: bytes, status: os.stat_result, names: list[bytes]) -> Entry:
    is_device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
    is_directory = stat.S_ISDIR(status.st_mode)
    return Entry(
        kind=_kind(status.st_mode),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size=0 if is_directory else status.st_size,
        content=_content(path, status),
        device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0),
        xattrs=tuple(sorted(_xattrs(path).items())),
        links=tuple(sorted(names)),
    )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symlink",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket",
    }
    return kinds[stat.S_IFMT(mode)]


def _content(path: bytes, status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return str(Path(os.fsdecode(path)).readlink())
    if not stat.S_ISREG(status.st_mode):
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _xattrs(path: bytes) -> dict[str, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    kept = [name for name in names if not name.startswith("trusted.overlay.")]
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in kept}
