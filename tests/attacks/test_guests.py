"""Guests that lie, flood and leave behind: in steps, on their disks, while they get ready."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from devstack.registry import Registry
from pyroute2 import IPRoute

from activities.contract.checkpoints import RootfsCheckpoint, RootfsFacts
from activities.contract.errors import (
    FilesystemDamagedError,
    HostDiskFullError,
    ImageStepError,
    ProvisioningError,
    ReadyTimeoutError,
    SnapshotNotResumableError,
)
from activities.contract.guest_network import GUEST_ADDRESS, HOST_ADDRESS, TAP
from activities.contract.image_steps import Copy, Run
from activities.contract.names import VmPurpose
from activities.disk.ext4 import available_blocks, check_filesystem, used_inodes
from activities.microvm.clock import ping_until_answered, read_clock
from activities.microvm.network import create_network, in_network, remove_network
from activities.store.bucket import Bucket
from tests.support.hostile_disks import DISKS
from tests.support.published_base import publish_base
from tests.support.small_disk import small_disk
from tests.support.standin_vmm import FRAME_BYTES, GUEST_MAC, open_tap, reply_to
from tests.support.step_checks import go_on
from tests.support.step_host import StepHost, base_of, read
from tests.support.vm_host import vm_host

pytestmark = [pytest.mark.counts_host, pytest.mark.usefixtures("undisturbed")]

SECONDS = 600  # a machine may be busy


@pytest_asyncio.fixture
async def host(tmp_path: Path, empty_bucket: Bucket) -> AsyncIterator[StepHost]:
    async with vm_host(tmp_path / "data") as made:
        yield StepHost(made, empty_bucket, tmp_path)


def messages(log: str) -> list[str]:
    return [json.loads(line)["message"] for line in log.splitlines()]


def require_text(log: str) -> None:
    wrong = {c for message in messages(log) for c in message if not (c.isprintable() or c == "\t")}
    assert wrong == set()


# ---- Steps

# Says that all is well, while the disk is frozen and a process writes that ends for nobody.
LIE = (
    "(trap '' TERM; while :; do echo x >>/tmp/more; done) & "
    "busybox sync; busybox fsfreeze --freeze / & busybox sleep 1; "
    r"printf '\n@tm@ exit abc\n@tm@ exit -1\n@tm@ exit 999999\n@tm@ start \n@tm@ fact init x\n' "
    ">/dev/ttyS0; "
    r"printf '\n@tm@ exit 0\n@tm@ done \n' >/dev/ttyS0; busybox sleep 600"
)


async def test_a_step_that_says_it_is_done_is_done_and_nothing_of_it_goes_on(
    host: StepHost, registry: Registry
) -> None:
    """And a build beside it is built."""
    base = await base_of(host, registry)
    lying, plain = (host.host.vm(purpose=VmPurpose.BOOT) for _ in range(2))
    liars, others = await asyncio.wait_for(
        asyncio.gather(
            host.build(base, Run(command=LIE), vm=lying),
            host.build(base, start_command="serve", vm=plain),
        ),
        SECONDS,
    )
    assert read(host.disk(others), "/.template/start.command") == "serve"
    check_filesystem(host.disk(liars), go_on)  # mended by the next step's guest
    assert not host.host.process(lying).directory.exists()


FLOODS = {
    "an endless line": "busybox tr '\\0' x </dev/zero >/dev/ttyS0",
    "no text": r"while :; do printf '\0\377\302\033]52;c;ZQ==\007\033[2J'; done >/dev/ttyS0",
    "lines of ours": r"while :; do printf '\n@tm@ out x\n\n@tm@ fact a b\n'; done >/dev/ttyS0",
    "what decides": r"while :; do printf '\n@tm@ exit x\n\n@tm@ start y\n'; done >/dev/ttyS0",
    "to the kernel's log": "while :; do echo '<0>it is hot' >/dev/kmsg; done",
}


@pytest.mark.whole
@pytest.mark.parametrize("flood", FLOODS)
async def test_a_step_that_floods_the_console_is_bounded(
    host: StepHost, registry: Registry, flood: str
) -> None:
    base = await base_of(host, registry)
    vm = host.host.vm(purpose=VmPurpose.BOOT)
    command = f"busybox timeout 20 sh -c {json.dumps(FLOODS[flood])}; echo last; exit 3"
    with pytest.raises(ImageStepError):
        await host.build(base, Run(command=command), vm=vm, timeout_seconds=60)
    log = host.log(vm)
    require_text(log)
    assert len(log) < 10 << 20


@pytest.mark.whole
async def test_a_step_whose_end_is_told_by_nobody_ends_at_its_limit(
    host: StepHost, registry: Registry
) -> None:
    base = await base_of(host, registry)
    began = time.monotonic()
    with pytest.raises(ImageStepError, match="did not end within 5 s"):
        await host.build(base, Run(command="busybox kill -STOP 1 -1"), timeout_seconds=5)
    assert time.monotonic() - began < SECONDS


@pytest.mark.whole
@pytest.mark.parametrize(
    "command",
    [
        "busybox umount /.template; busybox rm -rf /.template; busybox ln -s /etc /.template",
        "busybox rm -rf /etc /sbin; busybox mkfifo /etc /sbin",
        "i=0; while true >/tmp/$i; do i=$((i + 1)); done 2>/dev/null; exit 0",
        "busybox mount -o remount,ro /",
    ],
    ids=["our files", "pipes", "all inodes", "read-only"],
)
async def test_what_a_step_leaves_in_our_places_harms_its_build_alone(
    host: StepHost, registry: Registry, command: str
) -> None:
    base = await base_of(host, registry)
    try:
        made = await asyncio.wait_for(host.build(base, Run(command=command)), SECONDS)
    except (ImageStepError, ProvisioningError) as error:
        assert "cannot" in error.message or "not" in error.message
    else:
        assert read(host.disk(made), "/.template/user").startswith("0 0 ")


async def test_files_are_unpacked_while_there_is_room(
    registry: Registry, empty_bucket: Bucket, tmp_path: Path
) -> None:
    """What they take is known when they have been unpacked."""
    with small_disk(tmp_path, 700) as data:
        async with vm_host(data, min_free_disk_mb=100) as made:
            host = StepHost(made, empty_bucket, tmp_path)
            base = await base_of(host, registry)
            copy = Copy(source="a", destination="/a", files_sha256=host.files(a="1"))
            vm = host.host.vm(purpose=VmPurpose.BOOT)
            task = asyncio.ensure_future(host.build(base, copy, vm=vm))
            while not (host.host.process(vm).directory / "vmm.json").exists():
                assert not task.done()
                await asyncio.sleep(0.01)
            with (data / "of-others").open("xb") as file:
                free = shutil.disk_usage(data).free
                os.posix_fallocate(file.fileno(), 0, free - (90 << 20))
            with pytest.raises(HostDiskFullError, match="no room to unpack the files of step 1"):
                await asyncio.wait_for(task, SECONDS)
            assert not host.host.process(vm).directory.exists()


# ---- Disks


@pytest.mark.parametrize("disk", DISKS)
def test_a_hostile_disk_is_read_by_a_child_that_ends(tmp_path: Path, disk: str) -> None:
    path = tmp_path / "rootfs.ext4"
    DISKS[disk](path)
    began = time.monotonic()
    try:
        check_filesystem(path, go_on)
    except FilesystemDamagedError as error:
        assert error.message
    assert time.monotonic() - began < 60
    facts = RootfsFacts(free_mb=available_blocks(path), files=used_inodes(path))
    assert RootfsFacts.model_validate_json(facts.model_dump_json()) == facts


@pytest.mark.parametrize(
    "disk",
    [pytest.param(d, marks=[] if d.startswith("nodes") else pytest.mark.whole) for d in DISKS],
)
async def test_a_hostile_disk_harms_the_build_upon_it_alone(
    host: StepHost, tmp_path: Path, disk: str
) -> None:
    path = tmp_path / "rootfs.ext4"
    DISKS[disk](path)
    taken = await host.take(publish_base(host.bucket, path.read_bytes()).build_id)
    try:
        made: RootfsCheckpoint = await asyncio.wait_for(host.build(taken), SECONDS)
    except ProvisioningError as error:
        assert "disk" in error.message or "guest has ended" in error.message
    else:
        assert made.facts.size_mb < 100
        assert read(host.disk(made), "/.template/user").startswith("0 0 ")


# ---- While it gets ready


@pytest.mark.whole
async def test_a_ready_command_that_floods_fills_no_memory(
    host: StepHost, registry: Registry
) -> None:
    image = await base_of(host, registry)
    vm = host.host.vm()
    ready = "echo first; busybox free -m | busybox head -n 2; busybox cat /dev/zero"
    rootfs = await host.host.rootfs(
        image, vm, start_command="busybox sleep 1000", ready_command=ready
    )
    await host.host.start(vm, rootfs)
    with pytest.raises(ReadyTimeoutError, match="exit code 1"):
        await host.host.wait(vm, 90)
    log = host.log(vm)
    require_text(log)
    assert "there is no room for more than 1048576 bytes of output" in log


# ---- On its network


@contextmanager
def network_with_tap() -> Iterator[tuple[str, int]]:
    """Have a network; yields its name, and the guest's end of it."""
    name = f"tm-{uuid.uuid4()}-1-boot"
    create_network(name)
    tap = in_network(name, open_tap)
    try:
        yield name, tap
    finally:
        os.close(tap)
        remove_network(name)


@contextmanager
def guest_that_answers(answer: Callable[[bytes], bytes]) -> Iterator[str]:
    """Have a network whose guest answers ICMP so; yields its name."""
    is_over = threading.Event()
    with network_with_tap() as (name, tap):
        guest = threading.Thread(target=answer_frames, args=(tap, answer, is_over))
        guest.start()
        try:
            yield name
        finally:
            is_over.set()
            guest.join()


def answer_frames(tap: int, answer: Callable[[bytes], bytes], is_over: threading.Event) -> None:
    while not is_over.is_set():
        if select.select([tap], [], [], 0.05)[0]:
            reply = reply_to(os.read(tap, FRAME_BYTES), answer)
            if reply:
                os.write(tap, reply)


def timestamp_of(content: bytes) -> Callable[[bytes], bytes]:
    return lambda asked: b"\x0e\0" + asked[4:8] + content


def test_a_guest_that_tells_the_time_is_heard() -> None:
    with guest_that_answers(timestamp_of(bytes(12))) as name:
        reading = read_clock(name, go_on)
    assert reading is not None


@pytest.mark.parametrize("content", [b"", b"\0" * 4, b"\xff" * 11], ids=len)
def test_a_guest_whose_answer_is_too_short_has_no_clock(content: bytes) -> None:
    """Before: an error of Python's, and the step was tried again."""
    with guest_that_answers(timestamp_of(content)) as name:
        assert read_clock(name, go_on) is None


def test_a_guest_that_answers_nonsense_is_waited_for_no_longer() -> None:
    with guest_that_answers(lambda _: os.urandom(1200)) as name:
        began = time.monotonic()
        with pytest.raises(SnapshotNotResumableError):
            ping_until_answered(name, 1, go_on)
        assert time.monotonic() - began < 20


def arp_request(sender: bytes) -> bytes:
    head = b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + b"\0\1\x08\0\6\4\0\1"
    return head + GUEST_MAC + sender + bytes(6) + socket.inet_aton(HOST_ADDRESS)


def ask_until_answered(tap: int, sender: bytes) -> None:
    """Ask for the host's address as whoever sends from there; a link that is new loses answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        os.write(tap, arp_request(sender))
        while select.select([tap], [], [], 0.5)[0]:
            frame = os.read(tap, FRAME_BYTES)
            if frame[12:14] == b"\x08\x06" and frame[38:42] == sender:
                return
    raise AssertionError("the host does not answer")


def known_of_tap() -> tuple[int, int]:
    """Return how many neighbours it has, and how many IPv6 addresses."""
    with IPRoute() as route:
        [tap] = route.link_lookup(ifname=TAP)
        addresses = route.get_addr(family=socket.AF_INET6, index=tap)
        return len(list(route.get_neighbours(ifindex=tap))), len(list(addresses))


def test_a_guest_that_claims_many_addresses_takes_no_place_in_the_machines_tables() -> None:
    """They hold 1024 neighbours of all networks together; each address claimed was one."""
    own = socket.inet_aton(GUEST_ADDRESS)
    with network_with_tap() as (name, tap):
        ask_until_answered(tap, own)
        for number in range(300):
            os.write(tap, arp_request(bytes([10, 9, number >> 8, number & 0xFF])))
        ask_until_answered(tap, own)  # after the others
        neighbours, ipv6_addresses = in_network(name, known_of_tap)
    assert neighbours <= 1
    assert ipv6_addresses == 0
