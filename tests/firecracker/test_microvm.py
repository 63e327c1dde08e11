"""What the stand-in cannot show: snapshots, clock, console and ends of real Firecracker's VMs."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from devstack.registry import Layer, Registry

from activities.contract.errors import GuestDiedError, HostDiskFullError
from activities.contract.results import PulledImage
from activities.disk.data_dir import DataDir
from activities.microvm.vm_process import VmProcess
from tests.support.local_http import HTTPD
from tests.support.real_firecracker import HTTPD_LISTENS, IMAGE_CONFIG, MEMORY_MB, RealFirecracker
from tests.support.small_disk import small_disk
from tests.support.vm_host import VmHost


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
    log = host.bench.log_of(vm.scope)
    assert "the snapshot resumes" in log


async def test_a_guest_that_ends_is_not_taken_for_a_vmm_that_did(
    host: VmHost, image: PulledImage
) -> None:
    vm = host.vm()
    rootfs = await host.rootfs(
        image, vm, start_command="/bin/busybox reboot -f", ready_command="false"
    )
    await host.start(vm, rootfs)
    with pytest.raises(GuestDiedError, match="reboot: Restarting system"):
        await host.wait(vm)


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


async def test_a_disk_that_fills_at_the_snapshot_is_told_and_nothing_stays(
    firecracker: RealFirecracker, registry: Registry, tmp_path: Path
) -> None:
    registry.push("real-small", [Layer().directory("bin").busybox().tar()], config=IMAGE_CONFIG)
    with small_disk(tmp_path, 500) as data:
        async with firecracker.host(tmp_path, data) as host:
            image = await host.bench.pull(f"{registry.address}/real-small")
            vm, rootfs = await host.boot(image)
            directory = host.process(vm).directory
            ballast = data / "ballast"
            free = shutil.disk_usage(data).free
            ballast.write_bytes(bytes(free - (50 << 20)))
            with pytest.raises(HostDiskFullError, match="no room for the snapshot"):
                await host.snapshot(vm, rootfs)
            assert not {"memfile", "snapfile"} & {path.name for path in directory.iterdir()}
            ballast.unlink()
            snapshot = await host.snapshot(vm, rootfs)
            await host.verify(vm, snapshot)
