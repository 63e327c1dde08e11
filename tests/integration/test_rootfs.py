"""From an image in dockerd to an ext4 that holds exactly its files."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from devstack.registry import BUSYBOX, Layer, Registry
from devstack.workbench import Workbench, workbench
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import (
    AgentMissingError,
    CheckpointLostError,
    FilesystemToolError,
    HostDiskFullError,
    LeaseLostError,
    ProvisioningError,
    RootfsTooLargeError,
)
from activities.contract.names import Step
from activities.contract.results import PulledImage
from activities.disk import ext4
from activities.disk.tree_content import BLOCK, LARGE_FILE_BYTES
from activities.rootfs.guest_files import AGENT_LIMITS, agent_version
from activities.rootfs.guest_root import HOSTS
from tests.support.file_trees import (
    ADDED_DIRECTORIES,
    REPLACED,
    difference,
    in_mounted_ext4,
    read_tree,
    tree_of_ext4,
    tree_of_image,
)
from tests.support.host_resources import all_resources, assert_nothing_left
from tests.support.small_disk import small_disk

pytestmark = pytest.mark.counts_host

MIB = 1024 * 1024
# cap_net_bind_service=ep: struct vfs_ns_cap_data revision 2 (linux/capability.h)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Workbench]:
    before = all_resources()
    made = workbench(tmp_path / "data")
    yield made
    made.remove_images()
    assert_nothing_left(before)
    work = tmp_path / "data" / "work"
    assert not work.exists() or list(work.iterdir()) == []
    assert list((tmp_path / "data" / "steps").glob("*/*.tmp.*")) == []


async def pulled(
    host: Workbench, registry: Registry, name: str, *layers: Layer, **config: Any
) -> PulledImage:
    registry.push(name, [layer.tar() for layer in layers], config=config)
    return await host.pull(f"{registry.address}/{name}")


async def differences(host: Workbench, image: PulledImage, rootfs: Path) -> dict[str, object]:
    place = host.settings.data_dir.parent / "compare"
    try:
        expected = await asyncio.to_thread(
            tree_of_image, host.client, image.image_id, place / "image"
        )
        found = await asyncio.to_thread(tree_of_ext4, rootfs, place / "ext4")
        return difference(expected, found)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def everything() -> Layer:
    """A layer with every kind of thing that a tar and an ext4 can both hold."""
    layer = Layer().directory("bin").busybox().symlink("bin/sh", "busybox")
    layer.directory("odd", mode=0o1777, uid=70_000, gid=4_000_000_000)
    layer.add("odd/setuid", b"x", mode=0o6755, uid=1000, gid=1001)
    layer.add("odd/nobody-may", b"secret", mode=0o000)
    layer.add("odd/linked", b"one file\n").hard_link("odd/second name", "odd/linked")
    layer.symlink("odd/loop", "loop").symlink("odd/nowhere", "/does/not/exist")
    layer.hard_link("odd/hard link to a symlink", "odd/nowhere")
    layer.symlink("odd/long target", "t" * 200)
    layer.add("odd/null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666)
    layer.add("odd/block", kind=tarfile.BLKTYPE, device=(7, 200), mode=0o660)
    layer.add("odd/fifo", kind=tarfile.FIFOTYPE, mode=0o600)
    layer.add("odd/ünïcode \n\t'\"$`\\ name", b"name")
    layer.add("odd/" + "n" * 255, b"longest name")
    layer.add("odd/raw-\udcff\udcfe", b"no utf-8")
    layer.add("odd/capable", b"x", xattrs={"security.capability": CAPABILITY.decode("latin-1")})
    layer.add("odd/attributes", b"x", xattrs={"user.color": "blue", "user.long": "v" * 3000})
    layer.add("odd/in-2100", b"x", mtime="4102444800.987654321")
    layer.add("odd/in-1970", b"x", mtime="1.000000001")
    layer.directory("deep")
    for depth in range(1, 18):
        layer.directory("deep/" + "/".join(["d" * 200] * depth))
    return layer


async def test_the_root_file_system_is_the_image(host: Workbench, registry: Registry) -> None:
    image = await pulled(host, registry, "everything", everything())
    rootfs = await host.build_rootfs(image)
    assert await differences(host, image, rootfs) == {}


async def test_odd_things_are_as_the_image_has_them(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    """The values as the tar has them, so that dockerd and we cannot be wrong together."""
    image = await pulled(host, registry, "everything", everything())
    tree = await asyncio.to_thread(
        tree_of_ext4, await host.build_rootfs(image), tmp_path / "mounted"
    )
    assert (tree["/odd"].mode, tree["/odd"].uid, tree["/odd"].gid) == (
        0o1777,
        70_000,
        4_000_000_000,
    )
    setuid = tree["/odd/setuid"]
    assert (setuid.mode, setuid.uid, setuid.gid) == (0o6755, 1000, 1001)
    assert tree["/odd/setuid"].mtime_ns == 1_700_000_000_123_456_789
    assert tree["/odd/in-2100"].mtime_ns == 4_102_444_800_987_654_321
    assert tree["/odd/linked"].links == (b"/odd/linked", b"/odd/second name")
    assert len(tree["/odd/hard link to a symlink"].links) == 2
    assert tree["/odd/loop"].content == "loop"
    assert (tree["/odd/null"].kind, tree["/odd/null"].device) == ("character device", (1, 3))
    assert (tree["/odd/block"].kind, tree["/odd/block"].device) == ("block device", (7, 200))
    assert tree["/odd/fifo"].kind == "fifo"
    assert dict(tree["/odd/attributes"].xattrs)["user.long"] == b"v" * 3000
    assert "/odd/ünïcode \n\t'\"$`\\ name" in tree
    assert "/odd/raw-\udcff\udcfe" in tree


async def test_later_layers_win_as_in_overlayfs(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    lower = Layer().directory("a").add("a/gone", b"1").add("a/kept", b"2").directory("opaque")
    lower.add("opaque/hidden", b"3").directory("real").add("real/file", b"4")
    lower.symlink("link", "real").add("file-then-directory", b"5")
    middle = Layer().add("a/.wh.gone").directory("opaque").add("opaque/.wh..wh..opq")
    middle.add("opaque/shown", b"6").directory("link").add("link/own", b"7")
    upper = Layer().add(".wh.file-then-directory").add("a/kept", b"changed", mode=0o600)
    again = Layer().directory("file-then-directory").add("file-then-directory/x", b"8")
    image = await pulled(host, registry, "whiteouts", lower, middle, upper, again)
    rootfs = await host.build_rootfs(image)
    assert await differences(host, image, rootfs) == {}
    tree = await asyncio.to_thread(tree_of_ext4, rootfs, tmp_path / "mounted")
    assert {"/a/gone", "/opaque/hidden"} & tree.keys() == set()
    assert {"/a/kept", "/opaque/shown", "/link/own", "/real/file", "/file-then-directory/x"} <= (
        tree.keys()
    )
    assert tree["/link"].kind == "directory"
    assert (tree["/a/kept"].mode, tree["/a/kept"].size) == (0o600, 7)
    assert not [name for name in tree if ".wh." in name]


async def test_a_hundred_and_twenty_layers(host: Workbench, registry: Registry) -> None:
    layers = [Layer().add(f"file-{n}", str(n).encode()) for n in range(120)]
    image = await pulled(host, registry, "layers", *layers)
    assert image.layer_count == 120
    assert await differences(host, image, await host.build_rootfs(image)) == {}


async def test_holes_stay_holes(host: Workbench, registry: Registry, tmp_path: Path) -> None:
    """Docker writes the zeros of a tar as data or not; a gap of 64 MiB must not fill the disk."""
    layer = Layer().add("sparse", b"begin" + bytes(64 * MIB) + b"end")
    image = await pulled(host, registry, "sparse", layer)
    rootfs = await host.build_rootfs(image)
    assert await differences(host, image, rootfs) == {}


async def test_an_image_of_one_static_program(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    image = await pulled(host, registry, "scratch", Layer().busybox("server"))
    rootfs = await host.build_rootfs(image)
    tree = await asyncio.to_thread(tree_of_ext4, rootfs, tmp_path / "mounted")
    added = {"/proc", "/sys", "/dev", "/etc"}  # as Docker adds them to a container
    assert added | {"/server", "/.template/init"} <= tree.keys()
    assert not {"/run", "/tmp"} & tree.keys()


async def test_the_hosts_umask_is_not_the_guests(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    image = await pulled(host, registry, "umask", Layer().busybox("server"), WorkingDir="/srv/x")
    before = os.umask(0o077)
    try:
        rootfs = await host.build_rootfs(image)
    finally:
        os.umask(before)
    tree = await asyncio.to_thread(tree_of_ext4, rootfs, tmp_path / "mounted")
    directories = {name: entry.mode for name, entry in tree.items() if entry.kind == "directory"}
    assert directories.keys() >= {"/", "/etc", "/srv", "/srv/x", "/.template/bin", "/.template/run"}
    assert set(directories.values()) == {0o755}
    assert tree["/etc/hosts"].mode == 0o644
    assert tree["/.template/env"].mode == 0o600


@pytest.mark.parametrize("kind", ["none", "empty", "filled", "link", "device", "fifo"])
async def test_what_docker_covers_in_a_container_is_ours_in_a_guest(
    host: Workbench, registry: Registry, tmp_path: Path, kind: str
) -> None:
    """Hosts, host name and resolver: whatever the image has there, nobody has ever seen it."""
    layer = Layer().directory("etc").add("etc/else", b"the image's\n")
    for name in ("etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/mtab"):
        if kind == "empty":
            layer.add(name)
        elif kind == "filled":
            layer.add(name, b"10.0.0.1 mine\n")
        elif kind == "link":
            layer.symlink(name, "else")
        elif kind == "device":
            layer.add(name, kind=tarfile.CHRTYPE, device=(1, 3))
        elif kind == "fifo":
            layer.add(name, kind=tarfile.FIFOTYPE)
    image = await pulled(host, registry, f"covered-{kind}", layer)
    rootfs = await host.build_rootfs(image)
    place = tmp_path / "mounted"

    def read() -> dict[str, bytes]:
        assert (place / "etc/mtab").readlink() == Path("/proc/mounts")
        found = [path for path in (place / "etc").iterdir() if path.name != "mtab"]
        assert not any(path.is_symlink() for path in found)
        return {path.name: path.read_bytes() for path in found}

    files = await asyncio.to_thread(in_mounted_ext4, rootfs, place, read)
    assert files == {
        "else": b"the image's\n",
        "hostname": b"instance\n",
        "hosts": f"{HOSTS}169.254.0.21\tinstance\n".encode(),
        "resolv.conf": b"nameserver 8.8.8.8\n",
    }


@pytest.mark.parametrize("kind", ["link", "file"])
async def test_docker_s_directories_take_the_place_of_what_is_none(
    host: Workbench, registry: Registry, tmp_path: Path, kind: str
) -> None:
    layer = Layer().directory("else").add("else/passwd", b"app:x:1:2::/:\n")
    for name in ("proc", "sys", "dev", "etc"):
        layer.symlink(name, "else") if kind == "link" else layer.add(name, b"x")
    image = await pulled(host, registry, f"no-directories-{kind}", layer)
    rootfs = await host.build_rootfs(image)
    place = tmp_path / "mounted"

    def read() -> dict[str, list[str]]:
        names = ("proc", "sys", "dev", "etc")
        assert not any((place / name).is_symlink() for name in names)
        return {name: sorted(path.name for path in (place / name).iterdir()) for name in names}

    found = await asyncio.to_thread(in_mounted_ext4, rootfs, place, read)
    etc = ["hostname", "hosts", "mtab", "resolv.conf"]
    assert found == {"proc": [], "sys": [], "dev": [], "etc": etc}


async def test_a_working_directory_that_docker_refuses_is_refused(
    host: Workbench, registry: Registry
) -> None:
    image = await pulled(host, registry, "relative", Layer().busybox("box"), WorkingDir="srv/x")
    with pytest.raises(ProvisioningError, match="WORKDIR srv/x is no absolute path"):
        await host.build_rootfs(image)


async def test_a_link_in_the_image_cannot_write_to_the_host(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    plain = Layer().symlink("etc", str(victim)).symlink("tmp", str(victim / "new"))
    image = await pulled(host, registry, "hostile", plain)
    await host.build_rootfs(image)
    workdir = Layer().symlink("srv", str(victim))
    image = await pulled(host, registry, "hostile-workdir", workdir, WorkingDir="/srv/work")
    with pytest.raises(ProvisioningError, match="WORKDIR"):
        await host.build_rootfs(image)
    ours = Layer().symlink(".template", str(victim))
    image = await pulled(host, registry, "hostile-template", ours)
    await host.build_rootfs(image)
    loop = Layer().symlink(".template", ".template")
    image = await pulled(host, registry, "hostile-loop", loop)
    await host.build_rootfs(image)
    assert list(victim.iterdir()) == []


@pytest.mark.parametrize("disk_size_mb", [0, 1, 64, 1000])
async def test_the_free_space_is_what_was_asked_for(
    host: Workbench, registry: Registry, tmp_path: Path, disk_size_mb: int
) -> None:
    layer = Layer()
    for number in range(2000):
        layer.add(f"d{number % 7}/small-{number}", b"s" * (number * 3))
    layer.add("large", os.urandom(30 * MIB))
    image = await pulled(host, registry, f"sized-{disk_size_mb}", layer)
    rootfs = await host.build_rootfs(image, disk_size_mb=disk_size_mb)
    place = tmp_path / "mounted"
    disk = await asyncio.to_thread(in_mounted_ext4, rootfs, place, lambda: os.statvfs(place))
    free = disk.f_bavail * disk.f_frsize
    assert 0 <= free - disk_size_mb * MIB <= max(disk_size_mb * MIB * 0.02, MIB)
    assert disk.f_favail >= 2000  # as many files again
    assert rootfs.stat().st_blocks * 512 < 60 * MIB  # free space takes no room on the host


async def test_disks_of_many_gibibytes(host: Workbench, registry: Registry) -> None:
    """From 4 GiB on the tools of ext4 want threads: without any, they gave up."""
    image = await pulled(host, registry, "wide", everything())
    rootfs = await host.build_rootfs(image, disk_size_mb=5000)
    assert rootfs.stat().st_size > 5000 * MIB
    for size_bytes in (6000 * MIB, 4600 * MIB):
        ext4.resize_filesystem(rootfs, size_bytes, lambda: None)
        ext4.check_filesystem(rootfs, lambda: None)
    assert await differences(host, image, rootfs) == {}


async def test_many_files_have_inodes(host: Workbench, registry: Registry) -> None:
    layer = Layer()
    for number in range(18_000):
        layer.add(f"many/file-{number:06}", b"")
    image = await pulled(host, registry, "many", layer)
    assert await differences(host, image, await host.build_rootfs(image)) == {}


async def test_the_file_system_is_clean(host: Workbench, registry: Registry) -> None:
    image = await pulled(host, registry, "everything", everything())
    rootfs = await host.build_rootfs(image)
    done = subprocess.run(["e2fsck", "-fn", rootfs], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
    assert rootfs.stat().st_size % BLOCK == 0


async def test_too_large_says_both_sizes_before_any_copy(
    tmp_path: Path, registry: Registry
) -> None:
    before = all_resources()
    host = workbench(tmp_path / "data", max_rootfs_mb=64)
    image = await pulled(host, registry, "large-40", Layer().add("large", os.urandom(40 * MIB)))
    with pytest.raises(RootfsTooLargeError, match=r"image 4[0-9] MiB, free space 200 MiB.*64 MiB"):
        await host.build_rootfs(image, disk_size_mb=200)
    host.remove_images()
    assert_nothing_left(before)


async def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, registry: Registry) -> None:
    """The data directory is on a small file system of its own."""
    before = all_resources()
    with small_disk(tmp_path, 100) as point:
        host = workbench(point / "data")
        image = await pulled(host, registry, "large-40", Layer().add("large", os.urandom(40 * MIB)))
        host.settings.data_dir.mkdir(exist_ok=True)
        (point / "ballast").write_bytes(bytes(60 * MIB))
        with pytest.raises(HostDiskFullError, match="MiB are free") as error:
            await host.build_rootfs(image)
        assert "sweep" in error.value.hint
        assert not [p for p in (point / "data/steps").rglob("*") if p.is_file()]
        host.remove_images()
    assert_nothing_left(before)


async def test_an_unknown_user_fails_with_its_name(host: Workbench, registry: Registry) -> None:
    image = await pulled(host, registry, "no-user", Layer().busybox(), User="ghost")
    with pytest.raises(ProvisioningError, match="no user ghost"):
        await host.build_rootfs(image)


async def test_a_missing_agent_fails_before_any_work(tmp_path: Path, registry: Registry) -> None:
    host = workbench(tmp_path / "data", guest_agent_path=tmp_path / "no-agent")
    image = await pulled(host, registry, "agent", Layer().busybox())
    with pytest.raises(AgentMissingError, match="no-agent"):
        await host.build_rootfs(image)
    host.remove_images()


async def test_the_agent_is_put_in_and_asked_for_its_version(
    tmp_path: Path, registry: Registry
) -> None:
    agent = tmp_path / "agent"
    agent.write_text("#!/bin/sh\necho agent 1.2.3\n")
    agent.chmod(0o755)
    host = workbench(tmp_path / "data", guest_agent_path=agent)
    image = await pulled(host, registry, "agent", Layer().busybox())
    rootfs = await host.build_rootfs(image)
    tree = await asyncio.to_thread(tree_of_ext4, rootfs, tmp_path / "mounted")
    assert tree["/.template/agent"].mode == 0o755
    host.remove_images()


def test_an_agent_may_start_threads(tmp_path: Path) -> None:
    """One in Go does so before anything else, and reserves some hundred MiB of addresses."""
    agent = tmp_path / "agent"
    agent.write_text(
        f"#!{sys.executable} -IS\n"
        "import mmap, threading\n"
        "reserved = mmap.mmap(-1, 700 << 20)\n"
        "threads = [threading.Thread(target=print, args=['0.5.1']) for _ in range(20)]\n"
        "for thread in threads: thread.start()\n"
    )
    agent.chmod(0o755)
    host = workbench(tmp_path / "data", guest_agent_path=agent, tree_memory_mb=256)
    assert agent_version(host.settings, lambda: None) == "0.5.1"


def test_an_agent_in_go_is_told_of_few_processors(tmp_path: Path) -> None:
    """It might start a thread for each of a large host's, more than it may."""
    agent = tmp_path / "agent"
    agent.write_text('#!/bin/sh\necho "$GOMAXPROCS"\n')
    agent.chmod(0o755)
    host = workbench(tmp_path / "data", guest_agent_path=agent)
    processors = int(agent_version(host.settings, lambda: None))
    assert 1 <= processors < AGENT_LIMITS.threads / 4


async def test_an_image_that_is_gone_goes_back_to_the_pull(
    host: Workbench, registry: Registry
) -> None:
    image = await pulled(host, registry, "vanished", Layer().busybox().add("vanished", b"1\n"))
    host.remove_images()
    with pytest.raises(CheckpointLostError) as error:
        await host.build_rootfs(image)
    assert error.value.step is Step.PULL


async def test_a_second_build_uses_the_first_ones(host: Workbench, registry: Registry) -> None:
    image = await pulled(host, registry, "reused", Layer().busybox())
    first = await host.build_rootfs(image)
    made = first.stat()
    scope = host.scope()
    second = await host.build_rootfs(image, scope)
    assert (second, second.stat().st_ino) == (first, made.st_ino)
    assert "used again" in host.log_of(scope)
    other = await host.build_rootfs(image, start_command="sleep 1")
    assert other != first


async def test_a_forced_build_makes_its_own(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    image = await pulled(host, registry, "same", everything())
    first = await host.build_rootfs(image)
    scope = host.scope()
    forced = await host.build_rootfs(image, scope, force=True)
    assert forced != first
    assert first.exists()  # another build may be working on it
    place = tmp_path / "mounted"
    one = await asyncio.to_thread(tree_of_ext4, first, place)
    changed = difference(one, await asyncio.to_thread(tree_of_ext4, forced, place))
    assert changed.keys() <= ADDED_DIRECTORIES | REPLACED  # they are made now
    assert await host.build_rootfs(image, scope, force=True) == forced  # its own retry


def default_acl() -> str:
    """What new files in a directory get: rwx for user 1000 (linux/posix_acl_xattr.h)."""
    nobody = 0xFFFFFFFF
    entries = [(1, 7, nobody), (2, 7, 1000), (4, 5, nobody), (0x10, 7, nobody), (0x20, 5, nobody)]
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    return packed.decode("utf-8", "surrogateescape")


async def test_large_files_beside_small_ones(host: Workbench, registry: Registry) -> None:
    """Large files are copied in another way; nobody may see that."""
    large = os.urandom(LARGE_FILE_BYTES)
    layer = Layer().busybox()
    names = (
        "plain",
        "with space ",
        " first",
        "line\nbreak",
        "back\\slash",
        "*",
        "[a]",
        "-dash",
        "q?",
    )
    for directory in ("large", "large/odd *[]?\\ \n", "large/raw-\udcff"):
        layer.directory(directory, mode=0o2750, gid=7, mtime="1000000000.000000007")
        for name in names:
            layer.add(f"{directory}/{name}", large + name.encode(), uid=9, mode=0o4711)
            layer.add(f"{directory}/small {name}", name.encode())
    acl = {"system.posix_acl_default": default_acl()}
    layer.directory("acl", mtime="1000000000.5", xattrs=acl)
    layer.add("acl/large", large, mode=0o600, xattrs={"user.color": "blue"})
    layer.add("acl/small", b"small", mode=0o600)
    layer.hard_link("acl/large too", "acl/large").hard_link("large/third", "acl/large")
    layer.add("root-is-theirs", large, mtime="-5.25")
    image = await pulled(host, registry, "large-and-small", layer)
    rootfs = await host.build_rootfs(image)
    assert await differences(host, image, rootfs) == {}


async def test_two_builds_of_one_image_at_once(host: Workbench, registry: Registry) -> None:
    image = await pulled(host, registry, "twice", everything())
    one, other = await asyncio.gather(host.build_rootfs(image), host.build_rootfs(image))
    assert one == other
    assert await differences(host, image, one) == {}


async def copying(
    host: Workbench, registry: Registry, which: str
) -> tuple[ActivityEnvironment, Any]:
    """Start a build of a large image; returns when one of its copiers is at work."""
    layer = Layer()
    noise = os.urandom(16 * 1024) * (50 * MIB // (16 * 1024))  # quick to compress
    for number in range(3):
        layer.add(f"large-{number}", noise)
    for number in range(100):
        layer.add(f"not-large-{number}", noise[: LARGE_FILE_BYTES - 1])
    image = await pulled(host, registry, "copied", layer)
    environment = ActivityEnvironment()
    asked = host.rootfs_input(image, force=True)
    task = asyncio.ensure_future(environment.run(host.rootfs.build_rootfs, asked))
    deadline = time.monotonic() + 30
    while not copiers(host, which):
        assert time.monotonic() < deadline
        assert not task.done()
        await asyncio.sleep(0.001)
    return environment, task


def copiers(host: Workbench, *words: str) -> list[psutil.Process]:
    """The processes that copy a file system of this host and have one of these words."""
    place = str(host.settings.data_dir)
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (command := process.info["cmdline"])
        and command[0] in ("tar", "cp")
        and any(word in command for word in words)
        and any(place in argument for argument in command)
    ]


COPIERS = ("--create", "--extract", "cp")


@pytest.mark.parametrize("which", ["--create", "cp"])
async def test_a_cancelled_copy_stops_and_leaves_nothing(
    host: Workbench, registry: Registry, which: str
) -> None:
    environment, task = await copying(host, registry, which)
    environment.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert copiers(host, *COPIERS) == []


@pytest.mark.parametrize("which", COPIERS)
async def test_a_copy_that_dies_half_way_leaves_no_artifact(
    host: Workbench, registry: Registry, which: str
) -> None:
    _, task = await copying(host, registry, which)
    [process] = copiers(host, which)
    process.kill()
    with pytest.raises(FilesystemToolError) as error:
        await task
    assert error.value.retryable
    assert list((host.settings.data_dir / "steps").glob("*/*")) == []


async def test_a_lost_lease_stops_the_work(host: Workbench, registry: Registry) -> None:
    image = await pulled(host, registry, "lost", Layer().busybox())
    scope = host.scope(number=1)
    host.scope(scope.build_id, number=2)
    with pytest.raises(LeaseLostError):
        await host.build_rootfs(image, scope)


async def test_what_a_killed_worker_left_is_removed(
    host: Workbench, registry: Registry, tmp_path: Path
) -> None:
    scope = host.scope()
    work = host.settings.data_dir / "work" / scope.build_id / "rootfs.1.1"
    work.mkdir(parents=True)
    (work / "half").write_bytes(b"x")
    image = await pulled(host, registry, "leftovers", Layer().busybox())
    name = f"tm-{scope.build_id}-1-provision"
    host.client.create_container(
        image.image_id,
        name=name,
        command=["/bin/busybox"],
        labels={
            "template-manager.build-id": scope.build_id,
            "template-manager.lease": "1",
        },
    )
    await ActivityEnvironment().run(host.rootfs.clean_up_rootfs, scope)
    assert not work.exists()
    assert not host.client.containers(all=True, filters={"name": name})
    await ActivityEnvironment().run(host.rootfs.clean_up_rootfs, scope)  # twice is fine


async def test_volumes_health_checks_and_entrypoints_do_not_run(
    host: Workbench, registry: Registry
) -> None:
    image = await pulled(
        host,
        registry,
        "noisy",
        Layer().busybox().directory("data").add("data/kept", b"1"),
        Volumes={"/data": {}},
        Entrypoint=["/bin/false"],
        Healthcheck={"Test": ["CMD", "/bin/false"]},
        OnBuild=["RUN false"],
        StopSignal="SIGKILL",
    )
    assert await differences(host, image, await host.build_rootfs(image)) == {}


def test_the_comparison_sees_every_field(tmp_path: Path) -> None:
    """A comparer that sees nothing would make every test above pass."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copyfile(BUSYBOX, tmp_path / name / "file")
        os.utime(tmp_path / name / "file", ns=(5, 5))
        os.utime(tmp_path / name, ns=(5, 5))
    one, other = tmp_path / "a", tmp_path / "b"
    assert difference(read_tree(one), read_tree(other)) == {}

    def differs() -> bool:
        return "/file" in difference(read_tree(one), read_tree(other))

    file = other / "file"

    def becomes_a_fifo() -> None:
        file.unlink()
        os.mknod(file, stat.S_IFIFO)

    changes: list[Callable[[], None]] = [
        lambda: file.chmod(0o4755),
        lambda: os.chown(file, 1, 0),
        lambda: os.chown(file, 0, 1),
        lambda: os.utime(file, ns=(5, 6)),
        lambda: os.setxattr(file, "user.x", b"1"),
        lambda: os.link(file, other / "again"),
        becomes_a_fifo,
    ]
    for change in changes:
        change()
        assert differs()
        for path in other.iterdir():
            path.unlink()
        shutil.copyfile(BUSYBOX, file)
        os.utime(file, ns=(5, 5))
        os.utime(other, ns=(5, 5))
        assert not differs()
