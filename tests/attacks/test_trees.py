"""Hostile images: nothing in a tenant's file tree reaches the host, or stops a build beside it.

Each attack is an image that the test makes, built by the real activities.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from devstack.registry import Layer, Registry
from devstack.workbench import Workbench, workbench

from tests.support.file_trees import tree_of_ext4
from tests.support.host_resources import all_resources

pytestmark = pytest.mark.counts_host

MIB = 1024 * 1024
SECONDS = 60
OF_THE_HOST = b"the host's block device" * 1000


@dataclass(frozen=True)
class BlockDevice:
    """A loop device over a file of the test: it stands for a disk of the host."""

    path: Path
    content: Path

    @property
    def number(self) -> tuple[int, int]:
        """Major and minor."""
        return 7, int(self.path.name.removeprefix("loop"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BlockDevice]:
    content = tmp_path / "disk-of-the-host"
    content.write_bytes(OF_THE_HOST.ljust(MIB, b"\0"))
    before = content.read_bytes()
    made = subprocess.run(
        ["losetup", "--find", "--show", content], capture_output=True, text=True, check=True
    )
    device = BlockDevice(Path(made.stdout.strip()), content)
    try:
        yield device
        subprocess.run(["blockdev", "--flushbufs", device.path], check=True)
        assert content.read_bytes() == before
    finally:
        subprocess.run(["losetup", "--detach", device.path], check=True)


@pytest.fixture
def host(tmp_path: Path, disk: BlockDevice) -> Iterator[Workbench]:
    before = all_resources()
    made = workbench(tmp_path / "data")
    yield made
    made.remove_images()
    assert all_resources() == before
    work = tmp_path / "data" / "work"
    assert not work.exists() or list(work.iterdir()) == []
    assert list((tmp_path / "data" / "steps").glob("*/*.tmp.*")) == []


Put = Callable[[Layer, str, BlockDevice], object]

NODES: dict[str, Put] = {
    "block device": lambda layer, path, disk: layer.add(
        path, kind=tarfile.BLKTYPE, device=disk.number, mode=0o777
    ),
    "endless device": lambda layer, path, _: layer.add(
        path, kind=tarfile.CHRTYPE, device=(1, 5), mode=0o777
    ),
    "fifo": lambda layer, path, _: layer.add(path, kind=tarfile.FIFOTYPE, mode=0o777),
    "link to a device": lambda layer, path, disk: (
        layer.add("dev/disk", kind=tarfile.BLKTYPE, device=disk.number, mode=0o777)
        .symlink("dev/again", "disk")
        .symlink(path, "/dev/again")
    ),
    "link to /proc": lambda layer, path, _: layer.symlink(path, "/proc/self/mem"),
    "link to the host's root": lambda layer, path, _: layer.symlink(
        path, "/proc/1/root/etc/shadow"
    ),
    "link to itself": lambda layer, path, _: layer.symlink(path, "/" + path),
    "directory": lambda layer, path, _: layer.directory(path),
}
# Those that reached their aim are in the short form too.
SHORT = ("block device", "endless device", "fifo")
PLACES = (
    "etc/passwd",
    "etc/group",
    "etc/hosts",
    "etc/fstab",
    "etc",
    "sbin/init",
    "usr/lib/systemd/systemd",
    "bin/sh",
    ".template",
    "proc",
)


async def build(host: Workbench, registry: Registry, name: str, layer: Layer, **more: Any) -> Path:
    """Build of an image of this layer, in time; returns where the root file system is."""
    config = more.pop("config", {})
    registry.push(name, [layer.tar()], config=config)
    image = await host.pull(f"{registry.address}/{name}")
    return await asyncio.wait_for(host.build_rootfs(image, **more), SECONDS)


def named(*words: str) -> str:
    """Return a repository's name made of these words."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "node", [pytest.param(n, marks=[] if n in SHORT else pytest.mark.whole) for n in NODES]
)
async def test_a_node_reaches_nothing_wherever_it_is(
    host: Workbench, registry: Registry, disk: BlockDevice, node: str, place: str, tmp_path: Path
) -> None:
    """Before: dockerd read it as root for us, hung for ever, or took all memory of the host."""
    layer = Layer()
    NODES[node](layer, place, disk)
    rootfs = await build(host, registry, named(node, place), layer)
    tree = await asyncio.to_thread(tree_of_ext4, rootfs, tmp_path / "mounted")
    assert tree["/.template/init"].kind == "file"
    assert tree["/.template/user"].size == len("0 0 - \n")
    if not place.startswith((".template", "etc/hosts")):
        assert tree[f"/{place}"].kind != "file"  # it is the image's own
