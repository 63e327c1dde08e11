"""What the stand-in cannot show of real Firecracker's VMs; without its jailer.

What both show is in tests/integration, where real Firecracker has its jailer.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from devstack.environment import environment
from devstack.registry import Layer, Registry

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.errors import CheckpointLostError, TemplateManagerError
from activities.contract.results import PulledImage
from activities.contract.scope import VmRef
from activities.disk.data_dir import DataDir
from activities.host.passing_vm import passing_vm
from activities.microvm import microvm
from activities.microvm.console import ConsoleReader
from activities.microvm.trial_boot import boot_kernel
from activities.microvm.vm_process import VmProcess
from tests.support.local_http import HTTPD, HTTPD_LISTENS
from tests.support.real_firecracker import (
    IMAGE_CONFIG,
    MEMORY_MB,
    RealFirecracker,
)
from tests.support.vm_host import VmHost, until


async def test_from_boot_to_a_verified_snapshot(
    host: VmHost, image: PulledImage, firecracker: RealFirecracker
) -> None:
    """The clock is compared with what it was, and empty memory takes no disk."""
    vm, rootfs = await host.boot(image, start_command=HTTPD, ready_command=HTTPD_LISTENS)
    snapshot = await host.snapshot(vm, rootfs)
    memory = snapshot.files["memfile"]
    assert memory.size_bytes == MEMORY_MB << 20
    assert 0 < memory.allocated_bytes < 100 << 20
    before = snapshot.facts.clock_skew_ms
    assert before is not None
    await asyncio.sleep(20)
    verified = await host.verify(vm, snapshot)
    assert verified.seconds_since_snapshot > 20
    if firecracker.version >= (1, 16):  # which is told to move the clock on
        assert abs(verified.clock_skew_ms - before) < 1000
    assert "the snapshot resumes" in host.bench.log_of(vm.scope)
    used = sum(stretch.length for stretch in verified.prefetch) * 4096
    assert 0 < used < memory.size_bytes
    assert {stretch.access for stretch in verified.prefetch} == {"r", "w"}
    assert "of its memory by then" in host.bench.log_of(vm.scope)

    # Another Firecracker does not even try: here the stand-in, whose format is another.
    installed = host.settings.firecracker_path(host.shape.firecracker_version)
    installed.unlink()
    installed.symlink_to(environment().firecracker.resolve())
    made = f"was made by Firecracker {snapshot.facts.vmm_version} (snapshot format "
    with pytest.raises(CheckpointLostError, match=re.escape(made) + r"[\d.]+\); .* is .*-qemu, "):
        await host.verify(vm, snapshot)


async def test_a_template_does_not_have_the_limits_that_its_boot_had(
    firecracker: RealFirecracker, registry: Registry, tmp_path: Path
) -> None:
    buckets = {
        "bandwidth": {"size": 64 << 20, "one_time_burst": None, "refill_time": 1000},
        "ops": {"size": 10_000, "one_time_burst": None, "refill_time": 1000},
    }
    layer = Layer().directory("bin").busybox()
    registry.push("real-limited", [layer.tar()], config=IMAGE_CONFIG)
    async with firecracker.host(
        tmp_path, drive_mb_per_second=64, drive_ops_per_second=10_000
    ) as host:
        image = await host.bench.pull(f"{registry.address}/real-limited")
        vm, rootfs = await host.boot(image)
        assert _rate_limiter(host.process(vm)) == buckets
        snapshot = await host.snapshot(vm, rootfs)
        async with host.resumed(vm, snapshot) as name:
            resumed = VmProcess(DataDir(host.settings.data_dir).vm(name))
            assert _rate_limiter(resumed) is None


def _rate_limiter(vm: VmProcess) -> object:
    """What the VMM itself says of its root disk."""
    with vm.client() as client:
        config: Any = client._call("GET", "/vm/config")
    [drive] = config["drives"]
    return drive["rate_limiter"]


LINES = 100_000
STOPPED_SECONDS = 10
PLACE = 16 << 20
# mov dx, 0x3f8; again: lodsb; out dx, al; loop again; forever: cli; hlt; jmp forever
SAY = b"\x66\xba\xf8\x03\xac\xee\xe2\xfc\xfa\xf4\xeb\xfc"
# From boot_params, which rsi points to: mov eax, [rsi+0x218]; mov ecx, [rsi+0x21c]; mov esi, eax
TAKE_INITRD = b"\x8b\x86\x18\x02\x00\x00\x8b\x8e\x1c\x02\x00\x00\x89\xc6"
KERNELS = {
    # xsave: where KVM emulates kernels it does not know that; elsewhere nothing is set up for it.
    # The code is 0, as when a guest ends; of 1.13.1 now and then 1.
    "ends": (
        b"\x0f\xae\x21",
        r"ended \(exit code [01]\) before the guest kernel said a word: ",
        120,
    ),
    # cli, hlt, and again
    "stands still": (b"\xfa\xf4\xeb\xfd", "the guest kernel has not said a word within 5 s", 5),
}


@pytest.mark.parametrize("kernel", KERNELS)
async def test_a_kernel_that_does_not_run_here_is_told(
    firecracker: RealFirecracker, tmp_path: Path, kernel: str
) -> None:
    """Firecracker ends with code 0 also when KVM cannot go on."""
    instructions, told, seconds = KERNELS[kernel]
    async with bare_host(firecracker, tmp_path, {"vmlinux.bin": kernel_of(instructions)}) as host:
        installed = host.settings.firecracker_path(host.shape.firecracker_version)
        vms = DataDir(host.settings.data_dir)
        with passing_vm(vms) as vm, pytest.raises(TemplateManagerError, match=told) as error:
            boot_kernel(vm, host.settings, installed, host.shape, seconds=seconds)
    assert error.value.hint


def kernel_of(instructions: bytes) -> bytes:
    """Return an ELF (elf(5)) that is loaded at PLACE and begins with them."""
    offset, size = 64 + 56, len(instructions)
    head = (b"\x7fELF\x02\x01\x01", 2, 62, 1, PLACE, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = (1, 5, offset, PLACE, PLACE, size, size, 4096)
    packed = struct.pack("<16sHHIQQQIHHHHHH", *head) + struct.pack("<IIQQQQQQ", *segment)
    return packed + instructions


def kernel_that_says(text: bytes) -> bytes:
    """Return one that says a text, a byte at a time as Linux does, and stands still."""
    take = b"\x48\xbe%b\x48\xb9%b"  # mov rsi, …; mov rcx, …
    start = PLACE + len(take % (bytes(8), bytes(8)) + SAY)
    return kernel_of(take % (struct.pack("<Q", start), struct.pack("<Q", len(text))) + SAY + text)


async def test_no_line_of_a_guest_is_lost_while_nobody_listens(
    firecracker: RealFirecracker, registry: Registry, tmp_path: Path
) -> None:
    """Not even while the VMM's supervisor stands still. The guest is paused until it does; that it
    is ready is the last that it says."""
    lines = [f"@tm@ out {number}" for number in range(LINES)]
    said = "\n".join([*lines, "@tm@ ready 1", ""]).encode()
    async with bare_host(firecracker, tmp_path, {"vmlinux.bin": kernel_that_says(said)}) as host:
        vm, _ = await started(host, registry)
        process = host.process(vm)
        with process.client() as client:
            client.pause()
            [supervisor, _] = json.loads((process.directory / "vmm.json").read_text())["supervisor"]
            os.kill(supervisor, signal.SIGSTOP)
            await until(lambda: psutil.Process(supervisor).status() == psutil.STATUS_STOPPED)
            client._call("PATCH", "/vm", {"state": "Resumed"})
        heard = process.console.stat().st_size
        assert heard < len(said)
        await asyncio.sleep(STOPPED_SECONDS)
        assert process.console.stat().st_size == heard
        os.kill(supervisor, signal.SIGCONT)
        await host.wait(vm)
        assert process.console.read_bytes() == said
        assert str(ConsoleReader(process.console).lost()) == ""


async def test_an_initrd_beside_the_kernel_is_booted_with_it(
    firecracker: RealFirecracker, registry: Registry, tmp_path: Path
) -> None:
    """The kernel says what is in it."""
    files = {"vmlinux.bin": kernel_of(TAKE_INITRD + SAY), "initrd.img": READY}
    async with bare_host(firecracker, tmp_path, files) as host:
        vm, _ = await started(host, registry)
        await host.wait(vm)
        assert host.process(vm).console.read_bytes() == files["initrd.img"]


READY = b"@tm@ ready 1\n"
LOW = 0x10000  # where a CPU can begin, which does so in real mode
# mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr: from now on the interrupt controller listens to MSRs
BY_MSRS = b"\xb9\x1b\0\0\0\x0f\x32\x0d\0\x0c\0\0\x0f\x30"
# mov ecx, 0x830; mov edx, 1; mov eax, …; wrmsr: an interrupt for the second CPU
INTERRUPT = b"\xb9\x30\x08\0\0\xba\x01\0\0\0\xb8%b\x0f\x30"
INIT, STARTUP = 0x4500, 0x4600 | LOW >> 12
WAIT = b"\xb9\x20\x4e\0\0\xe2\xfe"  # mov ecx, 20000; loop to itself
# mov dx, 0x3f8; again: mov al, 'A'; out dx, al; mov al, '\n'; out dx, al; mov ecx, 4096; loop to
# itself; jmp again. The second has 16 bits, and says B.
FIRST_CPU = b"\x66\xba\xf8\x03\xb0A\xee\xb0\n\xee\xb9\0\x10\0\0\xe2\xfe\xeb\xf1"
SECOND_CPU = b"\xba\xf8\x03\xb0B\xee\xb0\n\xee\xb9\0\x10\xe2\xfe\xeb\xf3"


def kernel_of_two_cpus() -> bytes:
    """Return one that is ready, starts the second CPU, and lets each say its letter for ever."""

    def code(end: int) -> bytes:
        say = b"\xbe%b\xb9%b" % (dword(end), dword(len(READY))) + SAY[:-4]
        second = (dword(end + len(READY)), dword(LOW), dword(len(SECOND_CPU)))
        # mov esi, …; mov edi, …; mov ecx, …; rep movsb
        copy = b"\xbe%b\xbf%b\xb9%b\xf3\xa4" % second
        start = INTERRUPT % dword(INIT) + WAIT + INTERRUPT % dword(STARTUP)
        return say + copy + BY_MSRS + start + FIRST_CPU

    return kernel_of(code(PLACE + len(code(PLACE))) + READY + SECOND_CPU)


def dword(number: int) -> bytes:
    return struct.pack("<I", number)


async def test_two_vcpus_go_on_after_a_resume(
    firecracker: RealFirecracker,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a kernel of a few instructions, which does not answer pings."""
    async with bare_host(firecracker, tmp_path, {"vmlinux.bin": kernel_of_two_cpus()}) as host:
        host.shape = host.shape.model_copy(update={"vcpu_count": 2})
        vm, rootfs = await started(host, registry)
        await host.wait(vm)
        await until_both_have_said_something(host.process(vm))
        snapshot = await host.snapshot(vm, rootfs)
        monkeypatch.setattr(microvm, "ping_until_answered", lambda *_: None)
        async with host.resumed(vm, snapshot) as name:
            resumed = VmProcess(DataDir(host.settings.data_dir).vm(name))
            await until_both_have_said_something(resumed)


async def until_both_have_said_something(vm: VmProcess) -> None:
    await until(lambda: {*b"AB"} <= {*vm.console.read_bytes()}, 300)


@asynccontextmanager
async def bare_host(
    firecracker: RealFirecracker, place: Path, files: dict[str, bytes]
) -> AsyncIterator[VmHost]:
    """Have a host whose guests' kernel is a few instructions, with what lies beside it."""
    kernels = place / "kernel"
    kernels.mkdir()
    for name, content in files.items():
        (kernels / name).write_bytes(content)
    async with replace(firecracker, kernel_dir=kernels).host(place) as host:
        yield host


async def started(host: VmHost, registry: Registry) -> tuple[VmRef, RootfsCheckpoint]:
    """A VM whose guest does not look at its disk; and that disk."""
    registry.push("real-bare", [Layer().directory("bin").busybox().tar()], config=IMAGE_CONFIG)
    vm = host.vm()
    rootfs = await host.rootfs(await host.bench.pull(f"{registry.address}/real-bare"), vm)
    await host.start(vm, rootfs)
    return vm, rootfs
