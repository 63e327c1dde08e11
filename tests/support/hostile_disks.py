"""Disks as a guest may leave them: file systems that lie, loop, or stop who reads them."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

DISK_BYTES = 16 << 20
BLOCK = 4096
NOISE = random.Random(1)


def plain(disk: Path, *options: str) -> None:
    """Make an ext4 with a few files."""
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    tree = disk.with_suffix(".tree")
    if not tree.exists():
        for name in ("etc", "bin", "home", "lost+found"):
            (tree / name).mkdir(parents=True)
        (tree / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-d", str(tree), *options]
    subprocess.run([*command, str(disk)], check=True, capture_output=True)


def with_features(*names: str) -> Callable[[Path], None]:
    """Return a maker of a disk with features that few kernels have or few disks use."""
    encoding = ("-E", "encoding=utf8") if "casefold" in names else ()
    return lambda disk: plain(disk, "-O", ",".join(names), *encoding)


def edited(*commands: str, options: Sequence[str] = ()) -> Callable[[Path], None]:
    """Return a maker of a disk that debugfs has then written such things to, checksums and all."""

    def make(disk: Path) -> None:
        plain(disk, *options)
        script = "".join(f"{command}\n" for command in commands)
        subprocess.run(
            ["debugfs", "-w", "-f", "-", disk],
            input=script.encode(),
            check=True,
            capture_output=True,
        )

    return make


def panics_when_damaged(disk: Path) -> None:
    """Make one that tells the kernel to panic, and is damaged where a clean disk is not checked."""
    plain(disk, "-e", "panic", "-O", "^metadata_csum")
    found = subprocess.run(
        ["debugfs", "-R", "imap <2>", disk], capture_output=True, text=True, check=True
    ).stdout  # "… located at block N, offset 0x…"
    block, offset = found.split("located at block ")[1].split(", offset ")
    with disk.open("r+b") as file:  # the root directory is a file of extents that make no sense
        os.pwrite(file.fileno(), b"\xff" * 60, int(block) * BLOCK + int(offset, 16) + 0x28)


def with_noise_for_a_journal(disk: Path) -> None:
    """Make one whose journal is to be replayed and is noise."""
    plain(disk, "-O", "has_journal", "-J", "size=4")
    subprocess.run(["debugfs", "-w", "-R", "feature needs_recovery", disk], check=True)
    blocks = subprocess.run(
        ["debugfs", "-R", "blocks <8>", disk], capture_output=True, text=True, check=True
    ).stdout.split()
    with disk.open("r+b") as file:
        for block in blocks[1:64]:  # after the journal's own superblock
            os.pwrite(file.fileno(), NOISE.randbytes(BLOCK), int(block) * BLOCK)


def with_nodes_in_our_places(disk: Path) -> None:
    """Make one where FIFOs, devices and loops of links stand where our guest reads and writes."""
    tree = disk.with_suffix(".tree")
    for name in ("etc", "sbin", "usr/lib/systemd", "lost+found"):
        (tree / name).mkdir(parents=True)
    for name in ("etc/passwd", "etc/machine-id", "sbin/init"):
        os.mkfifo(tree / name, 0o777)
    (tree / "etc" / "group").symlink_to("/dev/zero")
    (tree / "usr" / "lib" / "systemd" / "systemd").symlink_to("systemd")
    (tree / ".template").symlink_to("/etc")
    (tree / "proc").symlink_to("/")
    os.mknod(tree / "dev", 0o777 | 0o060000, os.makedev(254, 0))
    plain(disk)


DISKS: dict[str, Callable[[Path], None]] = {
    "nodes in our places": with_nodes_in_our_places,
    "panics when damaged": panics_when_damaged,
    "noise for a journal": with_noise_for_a_journal,
    "casefold and encrypt": with_features("casefold", "encrypt"),
    "quota and verity": with_features("quota", "project", "verity"),
    "inline data and large directories": with_features("inline_data", "large_dir", "ea_inode"),
    "more blocks than there are": edited("ssv blocks_count 0xffffffff"),
    "more free than there are": edited("ssv free_blocks_count 0xffffffff"),
    "more inodes than there are": edited("ssv inodes_count 0xfffffff0"),
    "blocks of a size that is none": edited("ssv log_block_size 31"),
    "orphans in a ring": edited(
        "write /bin/true one", "write /bin/true two", "sif one links_count 0", "sif one dtime 15",
        "sif two links_count 0", "sif two dtime 14", "ssv last_orphan 14", "ssv state 0",
    ),
    "a directory in itself": edited("mkdir loop", "link / loop/again", "link loop loop/loop"),
    "no magic": edited("ssv magic 0"),
}  # fmt: skip
