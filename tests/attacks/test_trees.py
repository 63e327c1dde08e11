"""Hostile images: nothing in a tenant's file tree reaches the host, or stops a build beside it.

Each attack is an image that the test makes, built by the real activities.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from devstack.registry import Layer, Registry
from devstack.workbench import Workbench, workbench
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import ImageBeyondLimitError, ProvisioningError
from tests.support.file_trees import in_mounted_ext4, tree_of_ext4
from tests.support.host_resources import all_resources, assert_nothing_left
from tests.support.process_ends import is_alive

pytestmark = [pytest.mark.counts_host, pytest.mark.usefixtures("undisturbed")]

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
    assert_nothing_left(before)
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


async def build(
    host: Workbench,
    registry: Registry,
    name: str,
    layer: Layer,
    seconds: float = SECONDS,
    **more: Any,
) -> Path:
    """Build of an image of this layer, in time; returns where the root file system is."""
    config = more.pop("config", {})
    registry.push(name, [layer.tar()], config=config)
    image = await host.pull(f"{registry.address}/{name}")
    return await asyncio.wait_for(host.build_rootfs(image, **more), seconds)


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


async def test_a_build_beside_an_attack_is_built(
    host: Workbench, registry: Registry, disk: BlockDevice
) -> None:
    hostile = Layer().add("etc/passwd", kind=tarfile.FIFOTYPE).symlink("etc/group", "/dev/zero")
    plain = Layer().busybox().add("etc/passwd", b"app:x:7:8::/srv:\n")
    one, other = await asyncio.gather(
        build(host, registry, "hostile-beside", hostile),
        build(host, registry, "plain-beside", plain, config={"User": "app"}),
    )
    assert one != other


@pytest.mark.parametrize(
    "size_mb", [17, pytest.param(200, marks=pytest.mark.whole)], ids=["17 MB", "200 MB"]
)
@pytest.mark.parametrize("file", ["etc/passwd", "etc/group"])
async def test_a_bomb_of_accounts_is_refused(
    host: Workbench, registry: Registry, file: str, size_mb: int
) -> None:
    layer = Layer().add(file, bytes(size_mb * MIB))
    if file != "etc/passwd":
        layer.add("etc/passwd", b"app:x:7:8::/srv:\n")
    with pytest.raises(ProvisioningError, match=rf"{size_mb * MIB} bytes; the limit is \d+"):
        await build(host, registry, named(file, str(size_mb)), layer, config={"User": "app"})


async def test_a_million_groups_are_read(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    groups = b"".join(b"g:x:%d:\n" % (number % 60_000) for number in range(1_000_000))
    layer = Layer().add("etc/passwd", b"app:x:7:8::/srv:\n")
    layer.add("etc/group", groups + b"last:x:60001:app\n")
    rootfs = await build(host, registry, "groups", layer, config={"User": "app"})
    tree = await asyncio.to_thread(tree_of_ext4, rootfs, tmp_path / "mounted")
    assert tree["/.template/user"].size == len("7 8 60001 app\n")


async def test_more_entries_than_the_limit_are_refused(tmp_path: Path, registry: Registry) -> None:
    host = workbench(tmp_path / "data", max_image_entries=1000)
    layer = Layer()
    for number in range(1001):
        layer.add(f"file-{number}")
    with pytest.raises(ImageBeyondLimitError, match="at least 1001 files and") as error:
        await build(host, registry, "entries", layer)
    assert "TEMPLATE_MANAGER_MAX_IMAGE_ENTRIES" in error.value.message
    assert not error.value.retryable
    host.remove_images()


async def test_a_longer_path_than_the_limit_is_refused(tmp_path: Path, registry: Registry) -> None:
    host = workbench(tmp_path / "data", max_image_path_bytes=1000)
    layer = Layer()
    for depth in range(1, 12):
        layer.directory("/".join(["d" * 99] * depth))
    with pytest.raises(ImageBeyondLimitError, match="at least 1100 bytes in one name"):
        await build(host, registry, "long-path", layer)
    host.remove_images()


@pytest.mark.whole
async def test_a_large_file_of_very_many_names_is_copied(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    """Before: each name went on a command line, which the kernel refused as too long."""
    files = ("one", "two")  # an ext4 takes 65,000 names of one
    layer = Layer().add(files[0], bytes(MIB)).add(files[1], bytes(MIB))
    for number in range(90_000):
        layer.hard_link(f"{number:x}", files[number % 2])
    rootfs = await build(host, registry, "names", layer, seconds=240)
    place = tmp_path / "mounted"

    def links() -> set[int]:
        return {(place / name).stat().st_nlink for name in files}

    assert await asyncio.to_thread(in_mounted_ext4, rootfs, place, links) == {45_001}


async def test_a_deep_tree_where_our_files_go_is_left_out(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    layer = Layer()
    for depth in range(1, 1501):
        layer.directory("/".join([".template", *(["d"] * depth)]))
    rootfs = await build(host, registry, "deep", layer)
    tree = await asyncio.to_thread(tree_of_ext4, rootfs, tmp_path / "mounted")
    assert "/.template/d" not in tree
    assert "/.template/init" in tree


@pytest.mark.parametrize(
    "workdir", ["/link/to/work", "/pipe", "/pipe/below", "/dev/disk/below", "/proc/self/cwd/x"]
)
async def test_a_workdir_is_made_in_the_image_or_not_at_all(
    host: Workbench, registry: Registry, disk: BlockDevice, tmp_path: Path, workdir: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    layer = Layer().symlink("link", str(outside)).add("pipe", kind=tarfile.FIFOTYPE)
    layer.add("dev/disk", kind=tarfile.BLKTYPE, device=disk.number).symlink("proc/self", "/pipe")
    with pytest.raises(ProvisioningError, match="WORKDIR"):
        await build(
            host, registry, named("workdir", workdir), layer, config={"WorkingDir": workdir}
        )
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("hung", ["tar", "e2fsck"])
async def test_a_cancel_ends_what_hangs(
    host: Workbench, registry: Registry, hung: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped child neither answers nor ends: as one that is busy for ever."""
    registry.push("hangs", [Layer().busybox().tar()])
    image = await host.pull(f"{registry.address}/hangs")
    environment = ActivityEnvironment()
    with program_that_waits(hung) as place:
        monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
        asked = host.rootfs_input(image, force=True)
        task = asyncio.ensure_future(environment.run(host.rootfs.build_rootfs, asked))
        stopped = await stop_child(hung, task)
        environment.cancel()
        began = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, SECONDS)
    assert time.monotonic() - began < 30
    assert not any(is_alive(process) for process in stopped)


@contextlib.contextmanager
def program_that_waits(name: str) -> Iterator[Path]:
    """Have a directory with a program that waits for ever, which all users may enter: below
    pytest's own a child without rights does not find it, and runs the host's."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o755)
        os.mkfifo(place / "never", 0o644)
        (place / name).write_text(f"#!/bin/sh\nread -r _ < {place}/never\n")
        (place / name).chmod(0o755)
        yield place


async def stop_child(name: str, step: asyncio.Future[Any]) -> list[psutil.Process]:
    """Stop a process of that name below this one, which a step starts; returns it, and what waits
    for it. A step that ends before has its error raised."""
    while not step.done():
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name() == name:
                    process.suspend()
                    return [process, *process.parents()[:1]]
        await asyncio.sleep(0.05)
    raise AssertionError(f"{await step} was made, and no {name} was started")
